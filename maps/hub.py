"""Sharing maps: a hub repository with the map, its model card and a picture, uploaded or written to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from .act_map import ActMap
from .files import DEFAULT_FILENAME, replacing
from .model_card import model_card

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")  # what browsers show


def push_to_hub(
    act_map: ActMap,
    repo_id: str,
    *,
    filename: str = DEFAULT_FILENAME,
    picture: str | PathLike[str] | None = None,
    base_model: str | None = None,
    samples: Sequence[str] = (),
    card: str | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload `act_map` with a model card to the hub repository `repo_id`, which is created if need be, in one commit.

    A README.md that is there already is replaced; the repository's history keeps it.

    Args:
        repo_id: "user/name".
        filename, picture, base_model, samples, card: see `save_repository`.
        private: whether a new repository can be seen by its owner only.
        token: of the hub; None takes that of `hf auth login`.
        commit_message: None writes one.

    Returns:
        The commit's URL.

    Raises:
        ValueError, FileNotFoundError: as `save_repository`.
        OSError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with TemporaryDirectory() as folder:
        paths = save_repository(
            act_map,
            folder,
            repo_id,
            filename=filename,
            picture=picture,
            base_model=base_model,
            samples=samples,
            card=card,
        )
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = commit_message or f"Upload act map {act_map.metadata.name}"
        commit = api.create_commit(repo_id, operations, commit_message=message)
    return str(commit.commit_url)


def save_repository(
    act_map: ActMap,
    folder: str | PathLike[str],
    repo_id: str,
    *,
    filename: str = DEFAULT_FILENAME,
    picture: str | PathLike[str] | None = None,
    base_model: str | None = None,
    samples: Sequence[str] = (),
    card: str | None = None,
) -> list[Path]:
    """Write the files of the repository `repo_id` into `folder`, which `ActMap.load` reads.

    Args:
        filename: of the map.
        picture: a file to show on top of the card.
        base_model, samples: see `actmaps.maps.model_card.model_card`.
        card: text of README.md; None writes the model card.

    Returns:
        Their paths: the map, README.md and, with a picture, `preview` with the picture's ending.

    Raises:
        ValueError: if `repo_id` is none, `filename` does not end in .safetensors, or `picture` has another ending than `PICTURES`.
        FileNotFoundError: if there is no such picture.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    shown = None
    if picture is not None:
        picture = Path(picture)
        if picture.suffix.lower() not in PICTURES:
            raise ValueError(f"{picture.name!r} is no picture that the hub shows; use {', '.join(PICTURES)}")
        if not picture.is_file():
            raise FileNotFoundError(f"there is no picture {picture}")
        shown = f"preview{picture.suffix.lower()}"
    if card is None:
        card = model_card(act_map, repo_id, filename=filename, picture=shown, base_model=base_model, samples=samples)
    paths = [Path(folder, filename), Path(folder, "README.md")]
    act_map.save(paths[0])
    with replacing(paths[1]) as temporary:
        temporary.write_text(card, encoding="utf-8")
    if picture is not None and shown is not None:
        paths.append(Path(folder, shown))
        with replacing(paths[2]) as temporary:
            shutil.copyfile(picture, temporary)
    return paths
