"""Hooks of mkdocs: pages from files outside docs/, the list of tutorials, and links to source files."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {ROOT / "bench/RESULTS.md": "RESULTS.md", ROOT / "CHANGELOG.md": "CHANGELOG.md"}  # files outside docs/
NOTEBOOK_LINK = re.compile(r'(?<=href=")(?!\w+:)([^"#]+)\.(?:md|py)(?=["#])')
PICTURE_CELL = re.compile(r'^# %% alt="(.+)"$', re.MULTILINE)  # a cell of a tutorial that draws a picture
UNDESCRIBED = 'alt="No description has been provided for this image"'  # of nbconvert
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Enter all tutorials, in the order of their numbers, and let them show pictures."""
    os.environ.pop("MPLBACKEND", None)  # a backend of the user's choice, such as Agg, would not show them in a page
    tutorials = sorted(path.name for path in (DOCS / "tutorials").glob("[0-9]*.py"))
    for entry in config.nav or []:
        if "Tutorials" in entry:
            entry["Tutorials"] = [f"tutorials/{name}" for name in tutorials]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate links between files of the repository into links between pages; a source file is not a page."""
    folder = Path(page.file.abs_src_path or "").parent
    here = Path(page.file.src_uri).parent

    def translate(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = (folder / link).resolve()
        if target.is_relative_to(DOCS):
            name = target.relative_to(DOCS).as_posix()
        elif target in PAGES:
            name = PAGES[target]
        else:
            return text
        return f"[{text}]({os.path.relpath(name, here)}{anchor or ''})"

    return LINK.sub(translate, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate the links of tutorials, whose text the plugin for notebooks renders itself, and describe pictures."""
    if not page.file.src_uri.startswith("tutorials/"):
        return html
    descriptions = PICTURE_CELL.findall(Path(page.file.abs_src_path or "").read_text(encoding="utf-8"))
    parts = NOTEBOOK_LINK.sub(r"\1.html", html).split(UNDESCRIBED)
    if len(parts) != len(descriptions) + 1:
        raise PluginError(
            f"{page.file.src_uri} has {len(parts) - 1} pictures and {len(descriptions)} descriptions, expected one for "
            'each: the cell begins with # %% alt="DESCRIPTION".'
        )
    texts = [f'alt="{escape(text)}"' for text in descriptions]
    return parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
