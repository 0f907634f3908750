"""The site's pages that lie elsewhere in the repository, and links that lead out of it.

A link of a page is resolved as in the repository. Where what it names is a page or picture of the site, it leads there;
a source file is named without a link, since the site does not hold it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples/index.md",
    "examples/two-downloads/README.md": "examples/two-downloads.md",
    "examples/contracts/README.md": "examples/contracts.md",
}
"""Pages by their place in the repository, and in the site."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside the folder of documents."""
    root = Path(config.config_file_path).parent
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, content=(root / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead a page's links to where things are in the site."""
    place = page.file.src_uri
    source = next((one for one, other in ELSEWHERE.items() if other == place), f"docs/{place}")
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _led(part, source, place) for part in parts)


def _led(text: str, source: str, place: str) -> str:
    def link(match: re.Match[str]) -> str:
        picture, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = ELSEWHERE.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        if inside is None:
            return words
        return f"{picture}[{words}]({posixpath.relpath(inside, posixpath.dirname(place) or '.')}{anchor})"

    return _LINK.sub(link, text)
