"""The demo model's data set: captioned emoji in nine drawing styles, rebuilt from npm packages by one command.

    python -m actmaps.demo.dataset --out emoji-dataset

writes `images.npy` (uint8, (N, 64, 64, 3)) and `index.json` (concepts and records). Sets are aligned by code point. About a tenth of the
concepts is held out entirely, and about a tenth of the remaining concept-style pairs; the choice hashes names, so that
it depends neither on order nor on library versions. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .styles import IMAGE_SIZE, RENDER_SIZE, STYLE_TABLE, STYLES

ICON_SETS = ("twemoji", "noto", "fluent-emoji-flat", "fluent-emoji-high-contrast")
PACKAGES = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-emoji-high-contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase": "emojibase-data@17.0.0",
}
GROUPS = {0: "smileys", 1: "people", 3: "animals", 4: "food", 5: "places", 6: "activities", 7: "objects", 8: "symbols"}
# Left out: things that are text or clock hands, illegible at 64 pixels, and group portraits that differ in tiny figures only.
LEFT_OUT_SUBGROUPS = frozenset(
    ("time-clock", "av-symbol", "gender", "math", "punctuation", "currency", "other-symbol", "keycap", "alphanum")
)
LEFT_OUT_LABELS = frozenset(("middle finger",))
FACE_SUBGROUPS = ("face-", "cat-face", "monkey-face")
ACCESSORIES = ("hat", "sunglasses", "crown")
HELD_OUT_SHARE = 0.1
SPLITS = ("train", "held_out_concept", "held_out_pair")
SEED = 0


@dataclass(frozen=True)
class Concept:
    """A subject: `split` is "train" or "held_out"; `accessories` are those it is also drawn with."""

    label: str
    hexcode: str
    synonyms: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    subgroup: str
    split: str
    accessories: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One image: row in `images`, its concept, its style (index into STYLES), its accessory or None, and one of SPLITS."""

    image: int
    concept: Concept
    style: int
    accessory: str | None
    split: str


@dataclass(frozen=True)
class Dataset:
    """`images`: uint8 (N, 64, 64, 3), memory mapped; `records`: one per image, in the same order."""

    images: np.ndarray
    records: tuple[Record, ...]

    def select(self, *splits: str) -> list[Record]:
        """Records of the given splits (see SPLITS), in order."""
        return [record for record in self.records if record.split in splits]


# Names ---------------------------------------------------------------------------------------------------------------


def natural_label(label: str) -> str:
    """Turn a Unicode label into a short caption: "woman: red hair" -> "woman with red hair".

    >>> natural_label("man: bald")
    'bald man'
    """
    text = label.lower().replace("’", "'").replace("“", "").replace("”", "").replace("!", "")
    if ": " in text:
        head, tail = text.split(": ", 1)
        if tail == "bald":
            text = f"bald {head}"
        elif "hair" in tail or tail == "beard":
            text = f"{head} with {tail}" if tail != "beard" else f"{head} with a beard"
        else:
            text = f"{head} {tail}"
    text = text.replace(",", "")
    return re.sub(r"\s+", " ", text).strip()


def _code(hexcode: str) -> str:
    """Code point sequence without variation selectors: the key that all sets share."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the words only."""
    digest = hashlib.sha256("|".join((str(SEED), *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def concept_split(label: str) -> str:
    """Either "train" or "held_out", by a hash of the label."""
    return "held_out" if _unit_hash("concept", label) < HELD_OUT_SHARE else "train"


def pair_held_out(label: str, style: str) -> bool:
    """Whether this concept is never shown in this style, by a hash of both."""
    return _unit_hash("pair", label, style) < HELD_OUT_SHARE


def _synonyms(entry: dict[str, Any], shortcodes: list[dict[str, Any]], label: str) -> tuple[str, ...]:
    found: list[str] = []
    for table in shortcodes:
        names = table.get(entry["hexcode"], [])
        for name in [names] if isinstance(names, str) else names:
            words = name.replace("_", " ").replace("-", " ").strip()
            if len(words) > 2 and words != label and words not in found and not words.startswith(("+", "flag ")):
                found.append(words)
    return tuple(found[:4])


def _accessories(label: str, group: str, subgroup: str) -> tuple[str, ...]:
    """Round faces get every accessory; animals, plants and food one each, for captions that compose."""
    if subgroup.startswith(FACE_SUBGROUPS) and subgroup not in ("face-hat", "face-glasses", "face-costume"):
        return ACCESSORIES
    if group in ("animals", "food"):
        return (ACCESSORIES[int(_unit_hash("accessory", label) * len(ACCESSORIES))],)
    return ()


def build_concepts(packages: Path) -> list[Concept]:
    """Every subject of the data set, in Unicode order.

    Args:
        packages: folder that holds one unpacked npm package per name in PACKAGES.
    """
    base = packages / "emojibase"
    entries = json.loads((base / "en/data.json").read_text())
    meta = json.loads((base / "meta/groups.json").read_text())["subgroups"]
    shortcodes = [
        json.loads((base / f"en/shortcodes/{name}.json").read_text()) for name in ("github", "emojibase", "joypixels")
    ]
    codes = {_code(entry["hexcode"]) for entry in entries}
    concepts, seen = [], set()
    for entry in sorted((e for e in entries if e.get("group") in GROUPS), key=lambda e: e["order"]):
        code, subgroup = _code(entry["hexcode"]), meta[str(entry["subgroup"])]
        if subgroup in LEFT_OUT_SUBGROUPS or re.search(
            r"o’clock|-thirty|facing right|^family: |button", entry["label"]
        ):
            continue
        # "person golfing" looks like the man or the woman golfing in every set.
        if {f"{code}-200d-2640", f"{code}-200d-2642"} <= codes or entry["label"].startswith("person: "):
            continue
        label = natural_label(entry["label"])
        if label in seen or label in LEFT_OUT_LABELS:
            continue
        seen.add(label)
        group = GROUPS[entry["group"]]
        concepts.append(
            Concept(
                label,
                entry["hexcode"],
                _synonyms(entry, shortcodes, label),
                tuple(entry.get("tags", ())),
                group,
                subgroup,
                concept_split(label),
                _accessories(label, group, subgroup),
            )
        )
    return concepts


# Captions ------------------------------------------------------------------------------------------------------------

PLAIN_SHARE, EMPTY_SHARE = 0.33, 0.10


def subject_text(concept: Concept, accessory: str | None = None, synonym: str | None = None) -> str:
    """The words for what is drawn: "grinning face", "grinning face with a hat"."""
    name = synonym or concept.label
    if accessory is None:
        return name
    return f"{name} with {'' if accessory.endswith('s') else 'a '}{accessory}"


def sample_caption(record: Record, rng: random.Random) -> str:
    """A training caption: a third without style words, a tenth empty, the others "{subject}, {style words}" or alike."""
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return ""
    synonyms = record.concept.synonyms
    synonym = rng.choice(synonyms) if synonyms and rng.random() < 0.3 else None
    subject = subject_text(record.concept, record.accessory, synonym)
    if kind < EMPTY_SHARE + PLAIN_SHARE:
        return subject
    style = STYLE_TABLE[record.style]
    words = style.phrase if rng.random() < 0.5 else rng.choice(style.wordings)
    return f"{subject}, {words}" if rng.random() < 0.85 else f"{words} of {subject}"


def canonical_caption(record: Record) -> str:
    """The words "{subject}, {canonical style phrase}"."""
    return f"{subject_text(record.concept, record.accessory)}, {STYLES[record.style]}"


@cache
def known_concepts() -> tuple[Concept, ...]:
    """The concepts as shipped with the package (subjects.json), without the rendered images."""
    rows = json.loads(files(__package__).joinpath("subjects.json").read_text(encoding="utf-8"))
    return tuple(_concept(row) for row in rows)


def subjects(split: str) -> list[str]:
    """Labels of the subjects of a split, "train" or "held_out", in Unicode order.

    Raises:
        ValueError: for any other split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is 'train' or 'held_out', not {split!r}")
    return [concept.label for concept in known_concepts() if concept.split == split]


def _concept(row: dict[str, Any]) -> Concept:
    return Concept(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})


# Packages and renders ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$ACTMAPS_CACHE, or ~/.cache/actmaps."""
    return Path(os.environ.get("ACTMAPS_CACHE") or Path.home() / ".cache" / "actmaps")


def fetch_packages(folder: Path) -> Path:
    """Download and unpack the npm packages that are not there yet; returns the folder.

    Raises:
        RuntimeError: if npm is missing or a download fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed to download the icon sets: install Node.js, then run this again")
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        target = folder / name
        if target.exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            result = subprocess.run(  # noqa: S603 -- a constant package name
                [npm, "pack", "--silent", package], cwd=scratch, capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise RuntimeError(f"npm pack {package} failed: {result.stderr.strip()}")
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package").rename(target)
    return folder


_HAT = """<path d="M62 150 q66 26 132 0 l0 16 q-66 28 -132 0z M78 40 l100 0 -8 116 q-42 14 -84 0z" fill="#22222c"/>
<path d="M84 122 q44 14 88 0 l-2 24 q-42 14 -84 0z" fill="#e02038"/>"""
_SUNGLASSES = """<path d="M4 96 h248 v14 h-248z" fill="#15151c"/>
<path d="M14 96 h102 q4 66 -50 68 q-52 -4 -52 -68z M140 96 h102 q0 64 -52 68 q-54 -2 -50 -68z" fill="#15151c"/>
<path d="M34 108 l24 0 -22 32z M160 108 l24 0 -22 32z" fill="#ffffff"/>"""
_CROWN = """<path d="M44 160 L30 66 L84 112 L128 44 L172 112 L226 66 L212 160 q-84 18 -168 0z" fill="#ffc61a"/>
<circle cx="84" cy="142" r="10" fill="#e02038"/><circle cx="128" cy="146" r="12" fill="#2a7de1"/><circle cx="172" cy="142" r="10" fill="#e02038"/>"""
_INK = {"#e02038": "#ffffff", "#ffc61a": "#ffffff", "#2a7de1": "#000000", "#22222c": "#000000", "#15151c": "#000000"}


@cache
def _accessory_picture(accessory: str, ink: bool) -> Image.Image:
    body = {"hat": _HAT, "sunglasses": _SUNGLASSES, "crown": _CROWN}[accessory]
    if ink:
        body = re.sub("#[0-9a-f]{6}", lambda m: _INK.get(m[0], m[0]), body).replace(
            "/>", ' stroke="#000" stroke-width="7"/>'
        )
    return _rasterise(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256" width="256" height="256">{body}</svg>'
    )


def add_accessory(render: Image.Image, accessory: str, ink: bool = False) -> Image.Image:
    """Draw a hat, sunglasses or a crown on a render, placed by the silhouette's bounding box. Same size, RGBA."""
    scale = 0.92 if accessory == "sunglasses" else 0.74
    size = round(RENDER_SIZE * scale)
    canvas = Image.new("RGBA", render.size)
    canvas.alpha_composite(
        render.resize((size, size), Image.Resampling.LANCZOS), ((RENDER_SIZE - size) // 2, RENDER_SIZE - size - 6)
    )
    left, top, right, bottom = canvas.getchannel("A").getbbox() or (0, 0, RENDER_SIZE, RENDER_SIZE)
    centre, width, height = (left + right) / 2, right - left, bottom - top
    picture = _accessory_picture(accessory, ink)
    if accessory == "sunglasses":
        size, middle = round(max(width, 110) * 0.88), top + 0.40 * height
        corner = (round(centre - size / 2), round(middle - size * 0.5))
    else:
        size = round(max(width, 130) * (1.05 if accessory == "hat" else 0.9))
        corner = (round(centre - size / 2), round(max(top + 0.12 * height - size * 0.65, -0.14 * size)))
    layer = Image.new("RGBA", render.size)
    layer.paste(picture.resize((size, size), Image.Resampling.LANCZOS), corner)
    return Image.alpha_composite(canvas, layer)


def _rasterise(svg: str) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


class IconSets:
    """Renders icons of the downloaded sets by code point."""

    def __init__(self, packages: Path):
        self._pictures = {_code(path.stem): path for path in (packages / "fluent-emoji-3d/assets").glob("*.webp")}
        self._icons = {name: json.loads((packages / name / "icons.json").read_text()) for name in ICON_SETS}
        self._names = {
            name: {
                _code(code): icon for code, icon in json.loads((packages / name / "chars.json").read_text()).items()
            }
            for name in ICON_SETS
        }

    def has(self, source: str, hexcode: str) -> bool:
        """Whether the set draws this code point."""
        return _code(hexcode) in (self._pictures if source == "fluent-emoji-3d" else self._names[source])

    def render(self, source: str, hexcode: str) -> Image.Image:
        """256 x 256 RGBA, transparent background, with a margin of 4 %."""
        code = _code(hexcode)
        if source == "fluent-emoji-3d":
            return (
                Image.open(self._pictures[code])
                .convert("RGBA")
                .resize((RENDER_SIZE, RENDER_SIZE), Image.Resampling.LANCZOS)
            )
        table = self._icons[source]
        name = self._names[source][code]
        icon = table["icons"].get(name) or table["icons"][table["aliases"][name]["parent"]]
        width, height = icon.get("width", table["width"]), icon.get("height", table["height"])
        x, y = width * 0.04, height * 0.04
        return _rasterise(
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{-x} {-y} {width + 2 * x} {height + 2 * y}" width="{RENDER_SIZE}" height="{RENDER_SIZE}">{icon["body"]}</svg>'
        )


def plan_records(concepts: list[Concept], sets: IconSets) -> Iterator[Record]:
    """Every image to draw: concepts by accessories by the styles whose icon set has the concept."""
    image = 0
    for concept in concepts:
        for accessory in (None, *concept.accessories):
            for style, spec in enumerate(STYLE_TABLE):
                if not sets.has(spec.source, concept.hexcode):
                    continue
                held_out_pair = pair_held_out(concept.label, spec.phrase)
                split = "held_out_concept" if concept.split == "held_out" else SPLITS[2 if held_out_pair else 0]
                yield Record(image, concept, style, accessory, split)
                image += 1


def draw(record: Record, sets: IconSets) -> np.ndarray:
    """uint8 (64, 64, 3): the picture of one record."""
    style = STYLE_TABLE[record.style]
    render = sets.render(style.source, record.concept.hexcode)
    if record.accessory:
        render = add_accessory(render, record.accessory, ink=style.source == "fluent-emoji-high-contrast")
    return np.asarray(style.draw(render))


_worker_sets: IconSets | None = None


def _start_worker(packages: Path) -> None:
    global _worker_sets
    _worker_sets = IconSets(packages)


def _draw_chunk(records: list[Record]) -> np.ndarray:
    assert _worker_sets is not None
    return np.stack([draw(record, _worker_sets) for record in records])


def build(out: Path, packages: Path, workers: int | None = None, limit: int | None = None) -> Dataset:
    """Render the data set into `out`; a second call goes on where an interrupted one stopped.

    Args:
        out: folder for images.npy and index.json; index.json is written last, so it marks a complete set.
        packages: folder with the unpacked npm packages, see `fetch_packages`.
        workers: processes, default one per core.
        limit: draw only the first so many concepts.
    """
    from tqdm import tqdm

    if (out / "index.json").exists():
        return load(out)
    out.mkdir(parents=True, exist_ok=True)
    sets = IconSets(packages)
    concepts = [
        c for c in build_concepts(packages) if all(sets.has(style.source, c.hexcode) for style in STYLE_TABLE)
    ][:limit]
    records = list(plan_records(concepts, sets))
    part, progress = out / "images.part.npy", out / "progress.json"
    shape = (len(records), IMAGE_SIZE, IMAGE_SIZE, 3)
    resumable = part.exists() and progress.exists() and json.loads(progress.read_text())["shape"] == list(shape)
    images = np.lib.format.open_memmap(part, mode="r+" if resumable else "w+", dtype=np.uint8, shape=shape)
    done = json.loads(progress.read_text())["done"] if resumable else 0
    chunks = [records[start : start + 128] for start in range(done, len(records), 128)]
    with (
        get_context("spawn").Pool(workers, _start_worker, (packages,)) as pool,
        tqdm(total=len(records), initial=done, unit="image", desc="render") as bar,
    ):
        for chunk, pictures in zip(chunks, pool.imap(_draw_chunk, chunks), strict=True):
            images[chunk[0].image : chunk[-1].image + 1] = pictures
            images.flush()
            progress.write_text(json.dumps({"shape": shape, "done": chunk[-1].image + 1}))
            bar.update(len(chunk))
    del images
    part.rename(out / "images.npy")
    position = {concept.label: index for index, concept in enumerate(concepts)}
    index = {
        "styles": STYLES,
        "concepts": [asdict(concept) for concept in concepts],
        "records": [[position[r.concept.label], r.style, r.accessory, r.split] for r in records],
    }
    temporary = out / "index.json.part"
    temporary.write_text(json.dumps(index, ensure_ascii=False))
    temporary.rename(out / "index.json")
    progress.unlink()
    return load(out)


def load(folder: str | Path | None = None) -> Dataset:
    """Open a rendered data set (default: `cache_folder() / "emoji-dataset"`).

    Raises:
        FileNotFoundError: if it is not there or not complete; names the command that builds it.
        ValueError: if it was built with other styles than this version's.
    """
    folder = Path(folder) if folder is not None else cache_folder() / "emoji-dataset"
    if not (folder / "index.json").exists():
        raise FileNotFoundError(
            f"no complete data set in {folder}: build it with `python -m actmaps.demo.dataset --out {folder}`"
        )
    index = json.loads((folder / "index.json").read_text())
    if tuple(index["styles"]) != STYLES:
        raise ValueError(f"the data set in {folder} has other styles than this version: remove it and build it again")
    concepts = [_concept(row) for row in index["concepts"]]
    records = tuple(
        Record(i, concepts[c], style, acc, split) for i, (c, style, acc, split) in enumerate(index["records"])
    )
    return Dataset(np.load(folder / "images.npy", mmap_mode="r"), records)


def main() -> None:
    """Download, render, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder() / "emoji-dataset", help="folder of the data set")
    parser.add_argument("--packages", type=Path, default=cache_folder() / "npm", help="folder of the npm packages")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    parser.add_argument("--subjects-json", type=Path, help="also write the list of concepts that the package ships")
    arguments = parser.parse_args()
    dataset = build(arguments.out, fetch_packages(arguments.packages), arguments.workers)
    if arguments.subjects_json:
        concepts = {record.concept.label: record.concept for record in dataset.records}
        rows = ",\n".join(json.dumps(asdict(concept), ensure_ascii=False) for concept in concepts.values())
        arguments.subjects_json.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print(f"{len(dataset.records)} images of {len({r.concept for r in dataset.records})} concepts in {arguments.out}")


if __name__ == "__main__":
    main()
