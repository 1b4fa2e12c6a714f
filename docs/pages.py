"""What the site takes from outside of docs/: a hook of MkDocs.

README.md's beginning, CONTRIBUTING.md and others become pages, and the records of benchmarks/results/ lie beside them.
Links between them are written for a reader of the repository: here they become links of the site, and those to source
files, which it does not have, plain text.
"""

from __future__ import annotations

import posixpath
import re
import sysconfig
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
#: Where the overview ends: what follows in the README has pages of its own.
END = "\n## In an app\n"
RECORDS = "benchmarks/results/"

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)|!\[([^\]]*)\]\(([^)\s]*)\)")


@event_priority(100)  # before the plugin, which reads its paths then
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Docstrings are read from the installed package: only there are `runtimes` and `trainers` inside `vae_export`."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [sysconfig.get_path("purelib")]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and the records."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").partition(END if source == "README.md" else "\0")[0]
        files.append(File.generated(config, page, content=linked(text, "")))
    for record in sorted((ROOT / RECORDS).glob("*.json")):
        files.append(File.generated(config, f"records/{record.name}", abs_src_path=str(record)))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Links of the pages of docs/."""
    return markdown if page.file.src_uri in PAGES.values() else linked(markdown, "docs")  # type: ignore[attr-defined]


def linked(text: str, folder: str) -> str:
    """A document that lies in a folder of the repository, with links that hold in the site."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor, alternative, image = match.groups()
        if image is not None:
            return f"![{alternative}]({site(image, folder)})"
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        there = site(target, folder)
        return text if there is None else f"[{text}]({there}{anchor or ''})"

    return _LINK.sub(link, text)


def site(target: str, folder: str) -> str | None:
    """Where the site has what a document of a folder links to; None if it does not."""
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(RECORDS):
        return f"records/{path.removeprefix(RECORDS)}"
    return PAGES.get(path)
