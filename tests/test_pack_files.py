"""Files of the ComfyUI pack that need no ComfyUI to be checked: workflows, help pages, translations, metadata."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
NODES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
NODE_IDS = [
    "ACTFitMap", "ACTApplyMap", "ACTLoadMap", "ACTSaveMap", "ACTBlendMaps", "ACTPresetPrompts", "ACTInspectMap", "ACTDemoModel",
]  # fmt: skip
STOCK = {
    "CLIPTextEncode", "KSampler", "VAEDecode", "EmptyLatentImage", "EmptySD3LatentImage", "ImageScale", "ImageStitch",
    "PreviewImage", "PreviewAny", "MarkdownNote", "CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader",
    "FluxGuidance",
}  # fmt: skip


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return read(request.param), read(request.param.parent / "api" / request.param.name)


def test_the_templates_of_the_contract_are_there():
    assert {path.stem for path in WORKFLOWS} == {
        "fit-and-compare", "saved-map-strengths", "negation-cfg-1", "blend-two-styles", "preset-to-map", "sdxl-style", "flux-style",
    }  # fmt: skip
    assert {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")} == {path.stem for path in WORKFLOWS}


def test_only_our_nodes_and_stock_nodes_are_used(workflow):
    kinds = {node["type"] for node in workflow[0]["nodes"]}
    assert kinds - STOCK <= set(NODE_IDS)
    assert kinds & set(NODE_IDS)


def test_a_note_says_what_to_change(workflow):
    notes = [node["widgets_values"][0] for node in workflow[0]["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    assert notes[0].startswith("## ")
    assert "hange" in notes[0]


def test_both_formats_are_one_graph(workflow):
    ui, api = workflow
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    assert {key: node["type"] for key, node in nodes.items()} == {key: node["class_type"] for key, node in api.items()}
    links = {link[0]: link for link in ui["links"]}
    for key, node in nodes.items():
        given = api[key]["inputs"]
        linked = {}
        for slot, item in enumerate(node["inputs"]):
            if item["link"] is not None:
                _, origin, origin_slot, target, target_slot, kind = links[item["link"]]
                assert (target, target_slot) == (node["id"], slot)
                source = nodes[str(origin)]["outputs"][origin_slot]
                assert item["link"] in source["links"]
                assert kind == source["type"]
                linked[item["name"]] = [str(origin), origin_slot]
        assert linked == {name: value for name, value in given.items() if isinstance(value, list)}
        written = [value for value in node["widgets_values"] if value not in ("", "fixed")]
        assert written == [value for value in given.values() if not isinstance(value, list) and value != ""]


def test_inputs_of_our_nodes_are_those_that_they_have(workflow):
    for node in workflow[1].values():
        if node["class_type"] in NODE_IDS:
            assert set(node["inputs"]) <= set(NODES[node["class_type"]].get("inputs", {}))


def test_nodes_do_not_overlap_and_lie_in_their_groups(workflow):
    boxes = [(*node["pos"], *node["size"]) for node in workflow[0]["nodes"]]
    title = 30  # pixels above the box
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, p, q in boxes[i + 1 :]:
            assert x + w <= u or u + p <= x or y + h <= v - title or v + q <= y - title
    groups = [group["bounding"] for group in workflow[0]["groups"]]
    assert groups
    for i, (x, _, w, _) in enumerate(groups):
        for u, _, p, _ in groups[i + 1 :]:
            assert x + w <= u or u + p <= x


def test_presets_of_workflows_are_there(workflow):
    for node in workflow[1].values():
        if node["class_type"] == "ACTPresetPrompts":
            assert (ROOT / "maps" / "presets" / f"{node['inputs']['preset']}.toml").is_file()


def test_the_same_prompt_and_seed_are_compared(workflow):
    samplers = [node["inputs"] for node in workflow[1].values() if node["class_type"] == "KSampler"]
    assert len({(s["seed"], s["steps"], s["cfg"], s["sampler_name"], s["scheduler"]) for s in samplers}) <= 1


def test_workflows_that_need_other_models_say_so():
    for path in WORKFLOWS:
        text = path.read_text()
        needs = any(kind in text for kind in ("CheckpointLoaderSimple", "UNETLoader"))
        assert needs == ("**Needs**" in text) == (path.stem in ("sdxl-style", "flux-style"))


def test_templates_that_run_without_a_download_have_a_small_thumbnail():
    thumbnails = {path.stem for path in (ROOT / "workflows").glob("*.jpg")}
    assert thumbnails == {path.stem for path in WORKFLOWS} - {"sdxl-style", "flux-style"}
    for name in thumbnails:
        path = ROOT / "workflows" / f"{name}.jpg"
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("JPEG", (400, 400))
        assert path.stat().st_size < 60_000


# Help pages


@pytest.mark.parametrize("node", NODE_IDS)
def test_every_node_has_a_help_page_with_all_inputs_and_a_picture(node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text()
    for name in NODES[node].get("inputs", {}):
        assert f"`{name}`" in page, name
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures
    for picture in pictures:
        assert (ROOT / "web" / "docs" / picture).stat().st_size < 200_000


# Translations


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_names_every_node_input_and_output(language):
    assert len(LANGUAGES) >= 2
    theirs = read(ROOT / "locales" / language / "nodeDefs.json")
    assert set(theirs) == set(NODE_IDS)

    def keys(value):
        return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else bool(value)

    assert keys(theirs) == keys(NODES)
    main = read(ROOT / "locales" / language / "main.json")
    assert main["nodeCategories"]["AcT Maps"]


# Registry


def test_requirements_bring_no_torch_and_nothing_that_the_package_does_not_declare():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [
        re.split(r"[<>=;\[ ]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line[:1] not in ("", "#")
    ]
    declared = [re.split(r"[<>=;\[ ]", line)[0] for line in project["dependencies"]]
    assert names
    assert not any(name.startswith("torch") for name in names)
    assert set(names) <= set(declared)
    assert "diffusers" not in names


def test_the_registry_finds_what_it_asks_for():
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["comfy"]
    assert set(comfy) >= {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    assert comfy["requires-comfyui"] == ">=0.3.64"


def test_the_archive_leaves_out_what_users_do_not_run():
    ignored = (ROOT / ".comfyignore").read_text().splitlines()
    assert {"tests/", "benchmarks/"} <= set(ignored)
    assert not any(
        line.startswith(("demo/weights", "workflows", "web", "locales", "maps", "nodes")) for line in ignored
    )
