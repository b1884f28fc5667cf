"""The file format: what it holds, and what loading refuses."""

import json
import os
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.maps import files as act_map_files

METADATA = ActMapMetadata(
    name="anime",
    description="drawn, not painted",
    positions=64,
    support=(0.1, 0.9),
    spatial="shift",
    causal=False,
    transport_target=True,
    seed=7,
    timesteps=(0.0, 0.5),
    rows="both",
    architecture={"unet": "UNet2DConditionModel"},
    n_source=32,
    n_target=31,
    recommended_strength=0.5,
    presets=("anime",),
    costs={"unet.b": (2.0, 1.0), "unet.a": (1.5, 0.25)},
    libraries={"torch": "2.13.0"},
    licence="Apache-2.0",
    created="2026-11-23T00:00:00+00:00",
)


@pytest.fixture
def act_map():
    bounds = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])
    return ActMap(
        {
            "unet.b": AffineMap(torch.tensor([1.5, 1e-9]), torch.tensor([0.1, -3.0]), *bounds),
            "unet.a": AffineMap(torch.tensor([2.0]), torch.tensor([0.0])),
        },
        METADATA,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "map.safetensors"


def parts(path):
    """Tensors and the header of a file, read without this package."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(path, tensors=None, header=None, metadata=None):
    """Save `path` again with changed tensors (None: left out), header entries (None: left out) or metadata."""
    old, old_metadata = parts(path)
    changed = {**old, **(tensors or {})}
    entries = {**json.loads(old_metadata["actmaps"]), **(header or {})}
    entries = {key: value for key, value in entries.items() if value is not None}
    metadata = {"format": "pt", "actmaps": json.dumps(entries)} if metadata is None else metadata
    save_file({key: value for key, value in changed.items() if value is not None}, path, metadata=metadata)


# What is written


def test_a_saved_map_comes_back_bit_for_bit(act_map, path):
    act_map.save(path)
    loaded = ActMap.load(path)
    assert list(loaded) == list(act_map)
    for site, affine in act_map.items():
        for part in ("scale", "shift", "lower", "upper"):
            one, other = getattr(loaded[site], part), getattr(affine, part)
            assert (one is None and other is None) or torch.equal(one, other)
    assert loaded.metadata == act_map.metadata


def test_default_metadata_comes_back(path):
    ActMap({"unet.a": AffineMap.identity(1)}).save(path)
    assert ActMap.load(path).metadata == ActMapMetadata()


def test_the_file_is_plain_safetensors(act_map, path):
    act_map.save(path)
    tensors, metadata = parts(path)
    assert set(tensors) == {f"unet.b.{part}" for part in ("scale", "shift", "lower", "upper")} | {
        "unet.a.scale",
        "unet.a.shift",
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert metadata["format"] == "pt"
    header = json.loads(metadata["actmaps"])
    assert header["format_version"] == 1
    assert header["sites"] == {"unet.b": 2, "unet.a": 1}
    assert header["method"] == "linear"
    assert header["support"] == [0.1, 0.9]


def test_two_sites_may_share_a_tensor(path):
    ones = torch.ones(2)
    ActMap({"unet.a": AffineMap(ones, ones), "unet.b": AffineMap(ones, ones)}).save(path)
    assert ActMap.load(path)["unet.b"].shift.tolist() == [1.0, 1.0]


def test_saving_makes_folders_and_replaces_a_file(act_map, tmp_path):
    path = tmp_path / "new" / "folder" / "map.safetensors"
    act_map.save(path)
    ActMap({"unet.c": AffineMap.identity(1)}).save(str(path))
    assert list(ActMap.load(path)) == ["unet.c"]
    assert os.listdir(path.parent) == ["map.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(act_map, path, monkeypatch, error, step):
    act_map.save(path)
    before = path.read_bytes()

    def fail(*args, **_):
        if step == "save_file":
            with open(args[1], "wb") as file:
                file.write(b"half")
        raise error

    monkeypatch.setattr(f"actmaps.maps.files.{step}", fail)
    with pytest.raises(type(error)):
        act_map.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_only_safetensors_names_are_written(act_map, tmp_path):
    with pytest.raises(ValueError, match=r"act maps are \.safetensors files, got 'map\.pt'"):
        act_map.save(tmp_path / "map.pt")
    assert os.listdir(tmp_path) == []


# What is refused


def damaged(act_map, path, message, **changes):
    act_map.save(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        ActMap.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(act_map, path, kept):
    act_map.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ActMap.load(path)


def test_a_header_longer_than_the_file_is_refused(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ActMap.load(path)


def test_a_pickle_is_refused_and_not_run(path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path) + ".trapped",)

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ActMap.load(path)
    torch.save({"scale": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ActMap.load(path)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"lora_rank": "4"}])
def test_a_lora_is_refused(path, metadata):
    save_file({"unet.to_q.lora_A.weight": torch.ones(4, 8)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"is a safetensors file but no act map .*LoRA"):
        ActMap.load(path)


def test_a_file_too_large_for_a_map_is_refused_unread(path):
    with open(path, "wb") as file:
        file.truncate(act_map_files.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than an act map can have"):
        ActMap.load(path)


@pytest.mark.parametrize("version", [2, 0, "1", 1.5])
def test_another_version_is_refused_whatever_else_it_holds(act_map, path, version):
    damaged(act_map, path, "update actmaps", header={"format_version": version, "sites": None})


@pytest.mark.parametrize("text", ["", "{", "nonsense", "\\", "[1]", "null", "3", '"text"', "{}", '{"sites": {}}'])
def test_metadata_that_is_no_header_is_refused(act_map, path, text):
    damaged(act_map, path, "is damaged", metadata={"actmaps": text})


@pytest.mark.parametrize("sites", [[], {}, "unet.a", {"unet.a": "1"}, {"unet.a": 1.0}, {"unet.a": True}, 5])
def test_sites_must_map_names_to_counts(act_map, path, sites):
    damaged(act_map, path, "'sites' must map site names to unit counts", header={"sites": sites})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 5),
        ("name", ["a"]),
        ("positions", "64"),
        ("positions", 6.4),
        ("support", 3),
        ("causal", "yes"),
        ("causal", 1),
        ("seed", 0.5),
        ("seed", True),
        ("timesteps", 0.5),
        ("architecture", []),
        ("libraries", "torch"),
        ("n_source", "32"),
        ("recommended_strength", "half"),
        ("costs", [1, 2]),
        ("costs", {"unet.a": 1.0}),
        ("costs", {"unet.a": [1.0]}),
    ],
)
def test_metadata_of_another_type_is_refused(act_map, path, field, value):
    damaged(act_map, path, f"the metadata of .* is damaged: '{field}'", header={field: value})


def test_fields_of_later_versions_are_ignored(act_map, path):
    act_map.save(path)
    rewrite(path, header={"mood": "sunny", "licence": None})
    assert ActMap.load(path).metadata == replace(METADATA, licence="")


@pytest.mark.parametrize("part", ["scale", "shift"])
def test_a_missing_tensor_is_refused(act_map, path, part):
    damaged(act_map, path, r"lacks scale or shift of unet\.b", tensors={f"unet.b.{part}": None})


def test_half_a_support_is_refused(act_map, path):
    damaged(act_map, path, r"unet\.b: a support needs both bounds", tensors={"unet.b.upper": None})


def test_an_extra_tensor_is_refused(act_map, path):
    message = r"has tensors that belong to no site, for example unet\.c\.scale"
    damaged(act_map, path, message, tensors={"unet.c.scale": torch.ones(1)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["scale", "shift", "lower", "upper"])
def test_entries_that_are_not_finite_are_refused(act_map, path, part, value):
    tensors = {f"unet.b.{part}": torch.tensor([1.0, value])}
    damaged(act_map, path, rf"unet\.b: {part} has entries that are not finite", tensors=tensors)


def test_other_shapes_are_refused(act_map, path):
    message = r"unet\.a has shape \(3,\), its metadata says 1 units"
    damaged(act_map, path, message, tensors={"unet.a.scale": torch.ones(3), "unet.a.shift": torch.ones(3)})
    damaged(act_map, path, r"unet\.a: shift has shape \(3,\)", tensors={"unet.a.shift": torch.ones(3)})
    damaged(act_map, path, r"unet\.a has shape \(1, 1\)", tensors={"unet.a.scale": torch.ones(1, 1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_other_number_types_are_refused(act_map, path, dtype):
    damaged(act_map, path, r"unet\.a is not stored in float32", tensors={"unet.a.shift": torch.ones(1, dtype=dtype)})


# Where maps come from


def test_a_folder_holds_a_map_under_the_default_name(act_map, tmp_path):
    act_map.save(tmp_path / "act_map.safetensors")
    act_map.select(["unet.a"]).save(tmp_path / "other.safetensors")
    assert len(ActMap.load(tmp_path)) == 2
    assert len(ActMap.load(str(tmp_path), filename="other.safetensors")) == 1


def test_a_folder_without_the_map_says_what_it_holds(act_map, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no act_map\.safetensors; it has no \.safetensors file"):
        ActMap.load(tmp_path)
    act_map.save(tmp_path / "maps" / "anime" / "anime.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no act_map\.safetensors; it has anime\.safetensors"):
        ActMap.load("maps/anime")  # looks like a hub id, but the folder is here


@pytest.mark.parametrize("missing", ["nothing", "a/b.safetensors", "./a", "/a/b", "~/a", "a/b/c"])
def test_a_missing_file_is_no_hub_id(missing):
    with pytest.raises(FileNotFoundError, match="there is no act map file"):
        ActMap.load(missing)


def test_a_missing_path_object_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = (tmp_path / "user" / "name").relative_to(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no act map file"):
        ActMap.load(relative)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, act_map):
    """A cache that holds `user/style` in two revisions, of which `main` is the later one."""
    repository = tmp_path / "hub" / "models--user--style"
    for branch, commit, stored in (("old", "0" * 40, act_map.select(["unet.a"])), ("main", "1" * 40, act_map)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        stored.save(repository / "snapshots" / commit / "act_map.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_is_found_in_the_cache_without_network():
    assert len(ActMap.load("user/style")) == 2
    assert len(ActMap.load("user/style", revision="old")) == 1


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_that_cannot_be_had_says_so():
    for name, filename in (("user/style", "other.safetensors"), ("user/unknown", None)):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is no local file and could not be had from the hub"):
            ActMap.load(name, filename=filename)
