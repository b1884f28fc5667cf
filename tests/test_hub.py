"""Sharing on the hub: the real client against a hub of this machine that keeps what it is sent, and the cache offline."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.maps.hub import push_to_hub, save_repository


@pytest.fixture
def act_map():
    data = ActMapMetadata(
        name="ink", description="Wet ink.", licence="CC0-1.0", architecture={"unet": "UNet2DConditionModel"}
    )
    return ActMap({"unet.a": AffineMap(torch.full((2,), 1.5), torch.tensor([0.1, -3.0]))}, data)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grid.PNG"
    Image.new("RGB", (2, 2), "red").save(path)
    return path


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_repository_holds_the_map_its_card_and_the_picture(act_map, picture, tmp_path):
    folder = tmp_path / "new" / "ink"
    paths = save_repository(act_map, folder, "user/ink", picture=picture, base_model="org/model", samples=["a fox"])
    assert [path.name for path in paths] == ["act_map.safetensors", "README.md", "preview.png"]
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths)
    assert ActMap.load(folder)["unet.a"].shift.tolist() == act_map["unet.a"].shift.tolist()
    assert paths[2].read_bytes() == picture.read_bytes()
    card = paths[1].read_text(encoding="utf-8")
    assert "base_model: org/model" in card
    assert "](preview.png)" in card
    assert "- a fox\n" in card


def test_a_card_of_ones_own_is_taken_as_it_is(act_map, tmp_path):
    save_repository(act_map, tmp_path, "user/ink", card="mine")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"picture": "none.png"}, "there is no picture none.png"),
        ({"picture": "map.pdf"}, "'map.pdf' is no picture that the hub shows; use .png, .jpg"),
        ({"filename": "map.pt"}, "act maps are .safetensors files"),
        ({"repo_id": "user/two words"}, "'user/two words'"),
        ({"repo_id": "a/b/c"}, "'a/b/c'"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(act_map, tmp_path, arguments, problem):
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        save_repository(act_map, tmp_path / "new", **{"repo_id": "user/ink", **arguments})
    assert not (tmp_path / "new").exists()


# Uploading -----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers what an upload asks, and keeps the requests by the last parts of their paths."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers.get("Authorization"), content))
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        repository = f"http://{self.headers['Host']}/user/ink"
        answers = {
            "/api/repos/create": {"url": repository},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/user/ink/preupload/main": {"files": []},
            "/api/models/user/ink/commit/main": {"commitUrl": f"{repository}/commit/1", "commitOid": "1"},
        }
        if self.path not in answers:  # what clients ask by the way
            self.send_error(404)
            return
        answer = answers[self.path]
        if self.path.endswith("preupload/main"):
            asked = json.loads(self.server.requests[-1][2])["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def of(hub, ending):
    return [request for request in hub.requests if request[0].endswith(ending)]


def test_a_push_makes_the_repository_and_sends_everything_in_one_commit(hub, act_map, picture, tmp_path):
    url = act_map.push_to_hub("user/ink", private=True, token="secret", picture=picture, samples=["a fox"])
    assert url == f"http://127.0.0.1:{hub.server_port}/user/ink/commit/1"
    ((_, token, created),) = of(hub, "repos/create")
    assert token == "Bearer secret"
    assert json.loads(created)["name"] == "ink"
    asked = json.loads(created)
    assert asked.get("visibility") == "private" or asked.get("private") is True  # by version of the client
    ((_, token, sent),) = of(hub, "commit/main")
    assert token == "Bearer secret"
    header, *files = map(json.loads, sent.splitlines())
    assert header["value"]["summary"] == "Upload act map ink"
    content = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
    assert list(content) == ["act_map.safetensors", "README.md", "preview.png"]
    (tmp_path / "sent.safetensors").write_bytes(content["act_map.safetensors"])
    assert ActMap.load(tmp_path / "sent.safetensors").metadata == act_map.metadata
    assert content["README.md"].decode().endswith("CC0-1.0, of the map. The model that it steers has its own.\n")
    assert content["preview.png"] == picture.read_bytes()


def test_a_push_may_name_the_file_and_the_commit(hub, act_map):
    push_to_hub(act_map, "user/ink", token="secret", filename="wet.safetensors", commit_message="Wetter", card="mine")
    ((_, _, sent),) = of(hub, "commit/main")
    header, *files = map(json.loads, sent.splitlines())
    assert header["value"]["summary"] == "Wetter"
    assert [file["value"]["path"] for file in files] == ["wet.safetensors", "README.md"]
    assert base64.b64decode(files[1]["value"]["content"]) == b"mine"


def test_nothing_is_made_for_a_map_that_cannot_be_shared(hub, act_map):
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        act_map.push_to_hub("user/ink", token="secret", picture="none.png")
    assert hub.requests == []


# Loading by repository id, in a fresh process that may not use the network --------------------------------------------

COMMITS = {"main": "1" * 40, "old": "0" * 40}


@pytest.fixture
def cache(tmp_path, act_map):
    """A home of the hub's client whose cache holds `user/ink` in two revisions, of which `old` has two maps."""
    repository = tmp_path / "home" / "hub" / "models--user--ink"
    (repository / "refs").mkdir(parents=True)
    for branch, commit in COMMITS.items():
        (repository / "refs" / branch).write_text(commit)
        act_map.save(repository / "snapshots" / commit / "act_map.safetensors")
    wet = ActMap(act_map, ActMapMetadata(name="wet"))
    wet.save(repository / "snapshots" / COMMITS["old"] / "wet.safetensors")
    return tmp_path / "home"


def load_offline(cache, *cases):
    """For each (repository id, options) the name of the map that `ActMap.load` gives, or the error's kind and text."""
    code = (
        "import json, sys\nfrom actmaps.maps import ActMap\n"
        "for repo_id, options in json.loads(sys.argv[1]):\n"
        "    try:\n        print(ActMap.load(repo_id, **options).metadata.name)\n"
        "    except OSError as error:\n        print(type(error).__name__, ' '.join(str(error).split()))\n"
    )
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, json.dumps(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_a_cached_repository_loads_by_its_id_without_network_and_what_is_missing_is_named(cache):
    found = load_offline(
        cache,
        ("user/ink", {}),
        ("user/ink", {"revision": COMMITS["old"]}),
        ("user/ink", {"filename": "wet.safetensors", "revision": "old"}),
        ("user/other", {}),
        ("user/ink", {"filename": "wet.safetensors"}),
        ("user/ink", {"revision": "new"}),
    )
    missing = "FileNotFoundError '{}' is no local file and could not be had from the hub ({}): "
    assert found[:3] == ["ink", "ink", "wet"]
    assert found[3].startswith(missing.format("user/other", "act_map.safetensors"))
    assert found[4].startswith(missing.format("user/ink", "wet.safetensors"))
    assert found[5].startswith(missing.format("user/ink", "act_map.safetensors of revision new"))
