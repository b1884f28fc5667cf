"""Files of maps in ComfyUI's folders: where they may lie, and what bad ones say."""

import folder_paths
import pytest
import torch

from actmaps.maps import ActMap, AffineMap
from actmaps.nodes.files import FOLDER, ACTLoadMap, ACTSaveMap, map_path, register_folder, save_path


@pytest.fixture
def act_map():
    return ActMap({"unet.norm": AffineMap(torch.tensor([2.0]), torch.tensor([1.0]))})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    folder_paths.folder_names_and_paths.pop(FOLDER, None)
    register_folder()
    return tmp_path / FOLDER


def test_a_map_is_saved_and_loaded_under_its_name(folder, act_map):
    saved = ACTSaveMap.execute(act_map=act_map, filename="ink", overwrite=False)
    assert saved.result == (str(folder / "ink.safetensors"),)
    assert "ink.safetensors" in folder_paths.get_filename_list(FOLDER)
    (loaded,) = ACTLoadMap.execute(map_name="ink.safetensors").result
    assert torch.equal(loaded["unet.norm"].scale, torch.tensor([2.0]))


def test_names_are_numbered_unless_overwritten(folder, act_map):
    names = [ACTSaveMap.execute(act_map=act_map, filename="ink", overwrite=False).result[0] for _ in range(3)]
    assert [name.rsplit("/", 1)[1] for name in names] == ["ink.safetensors", "ink_2.safetensors", "ink_3.safetensors"]
    assert ACTSaveMap.execute(act_map=act_map, filename="ink", overwrite=True).result == (names[0],)
    assert len(list(folder.iterdir())) == 3


def test_subfolders_are_made(folder, act_map):
    ACTSaveMap.execute(act_map=act_map, filename="styles/ink.safetensors", overwrite=False)
    assert (folder / "styles" / "ink.safetensors").is_file()
    assert map_path("styles/ink.safetensors") == folder / "styles" / "ink.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../ink",
        "a/../../ink",
        "/tmp/ink",
        "C:\\ink",
        "..\\ink",
        "ink\x00",
        "",
        " ",
        ".",
        "..",
        "a//b",
        "con:",
        "in\nk",
        "a/ ",
    ],
)
def test_names_that_leave_the_folder_are_refused(folder, name, act_map):
    with pytest.raises(ValueError, match="is no name for an act map"):
        save_path(name, overwrite=True)
    with pytest.raises(ValueError, match="is no name for an act map"):
        ACTSaveMap.execute(act_map=act_map, filename=name, overwrite=True)
    assert not folder.exists()


def test_links_do_not_lead_out_either(folder, tmp_path, act_map):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="is no name"):
        save_path("link/ink", overwrite=True)
    act_map.save(outside / "ink.safetensors")
    with pytest.raises(ValueError, match="there is no act map"):
        map_path("link/ink.safetensors")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "ink.txt", "none.safetensors", "\x00"])
def test_only_maps_within_the_folder_are_read(folder, tmp_path, name):
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (folder / "ink.txt").write_text("x")
    with pytest.raises(ValueError, match=r"there is no act map .* put the \.safetensors file into"):
        map_path(name)


def test_a_changed_file_is_read_again(folder, act_map):
    ACTSaveMap.execute(act_map=act_map, filename="ink", overwrite=False)
    before = ACTLoadMap.fingerprint_inputs(map_name="ink.safetensors")
    assert ACTLoadMap.fingerprint_inputs(map_name="ink.safetensors") == before
    bigger = ActMap({**act_map, "unet.other": act_map["unet.norm"]})
    ACTSaveMap.execute(act_map=bigger, filename="ink", overwrite=True)
    assert ACTLoadMap.fingerprint_inputs(map_name="ink.safetensors") != before
