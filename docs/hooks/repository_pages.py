"""Puts files that lie outside docs/ into the site, and turns the links between all of them into links of the site.

The repository shows its Markdown by itself, with links from file to file; the site has another order. Links to files that are
no page of the site, such as NOTICE, become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
_HELP = [path.relative_to(ROOT / "web/docs").as_posix() for path in sorted((ROOT / "web/docs").rglob("*.*"))]
# Path in the repository: path in the site.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "web/icon.png": "images/icon.png",
    **{f"web/docs/{name}": f"reference/nodes/{name}" for name in _HELP},
}
_IN_REPOSITORY = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Rewrite the links that lead out of docs/ or into it."""
    here = page.file.src_uri
    source = _IN_REPOSITORY.get(here, f"docs/{here}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        in_site = PAGES.get(wanted, wanted.removeprefix("docs/"))
        if files.get_file_from_path(in_site) is None:
            return text if (ROOT / wanted).exists() and not wanted.startswith("docs/") else link[0]
        return f"[{text}]({posixpath.relpath(in_site, posixpath.dirname(here))}{anchor})"

    return _LINK.sub(rewritten, markdown)
