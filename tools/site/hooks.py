"""What mkdocs is to do beside: pages made of the code, and pages of files outside of docs/.

A link from a page to a file of the repository, such as ../examples/demo.py, leads on the site to a
page that shows that file.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
AS_PAGES = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "recipes/README.md": "recipes.md",
}
LINK = re.compile(r"\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".sh": "sh", ".sbatch": "sh", ".yaml": "yaml", ".yml": "yaml"}
SOURCE = "source/"
HIDDEN = "---\nsearch:\n  exclude: true\n---\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give the navigation its entry for each command."""
    (section,) = [entry for entry in config.nav if "Reference" in entry]
    section["Reference"].append({"Commands": reference.navigation()})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are in no file of docs/."""
    made = reference.pages()
    for name, place in AS_PAGES.items():
        made[place] = (ROOT / name).read_text(encoding="utf-8")
    for path in linked_files():
        made[source_page(path)] = shown(path)
    for place, text in made.items():
        level = InclusionLevel.UNDEFINED
        if place.startswith(SOURCE):  # reached by links alone
            level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place, content=text, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ lead to the pages that stand for their targets."""
    places = {place: name for name, place in AS_PAGES.items()}
    source = page.file.src_uri
    here = posixpath.dirname(places.get(source, f"docs/{source}"))

    def led(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link["path"]))
        if (inside := place_of(target)) is None:
            return link[0]
        way = posixpath.relpath(inside, posixpath.dirname(source) or ".")
        return f"]({way}{link['anchor'] or ''})"

    return LINK.sub(led, markdown)


def place_of(target: str) -> str | None:
    """Return where a file of the repository is on the site, or None where it is nowhere."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target in AS_PAGES:
        return AS_PAGES[target]
    return source_page(target) if (ROOT / target).exists() else None


def source_page(path: str) -> str:
    return f"{SOURCE}{path}.md"


def linked_files() -> list[str]:
    """Return the files outside of docs/ that pages link to, but those that are pages themselves."""
    pages = [*DOCS.rglob("*.md"), *(ROOT / name for name in AS_PAGES)]
    targets = {
        posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), link["path"]))
        for page in pages
        for link in LINK.finditer(page.read_text(encoding="utf-8"))
    }
    return sorted(
        target
        for target in targets
        if not target.startswith(("docs/", "..")) and target not in AS_PAGES
        if (ROOT / target).exists()
    )


def shown(path: str) -> str:
    """Return a page that shows a file, or lists a folder; what is Markdown is shown as that."""
    if (ROOT / path).is_dir():
        names = sorted(file.name for file in (ROOT / path).iterdir() if file.is_file())
        return "\n".join([HIDDEN, f"# {path}", "", *(f"- `{name}`" for name in names)])
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return HIDDEN + text
    if path.endswith(".ipynb"):
        return HIDDEN + notebook(json.loads(text))
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"{HIDDEN}# {path}\n\n`````{language}\n{text}\n`````\n"


def notebook(cells: dict[str, Any]) -> str:
    """Return a page that shows a notebook's texts and code."""
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells["cells"]]
    shown = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in sources]
    return "\n\n".join(shown) + "\n"
