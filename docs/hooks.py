"""What the site needs beyond the pages in docs/: README and changelog as pages, and the files that pages link to.

A page in docs/ links to code and figures by relative paths, as a reader of the repository needs them. The site has no
folder above docs/: so a linked image is copied into it, and any other linked file becomes a page that shows its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)((?:#[^)\s]*)?\))")
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
_IMAGES = (".png", ".svg")
_LANGUAGES = {".py": "python", ".cu": "cuda", ".cuh": "cuda", ".h": "cpp", ".cpp": "cpp", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and images that lie outside docs/."""
    for source, target in _PAGES.items():
        files.append(File.generated(config, target, content=_relinked((ROOT / source).read_text(), source, target)))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, text in texts.items():
        source = _source_of(page)
        for path in filter(None, (_outside(target, source) for _, target, _ in _LINK.findall(_without_code(text)))):
            name = _site_name(path)
            if files.get_file_from_path(name) is None:
                files.append(_published(config, path, name))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that lead out of docs/ at what `on_files` added."""
    if page.file.src_uri in _PAGES.values() or page.file.src_uri.startswith("source/"):
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _source_of(page: str) -> str:
    return next((source for source, target in _PAGES.items() if target == page), f"docs/{page}")


def _outside(target: str, source: str) -> str | None:
    """The repository path that `target` in the document `source` means, where it exists outside docs/."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = path.startswith(("docs/", "..", "source/")) or path in _PAGES
    return None if inside or not (ROOT / path).exists() else path


def _site_name(path: str) -> str:
    return f"source/{path}" if path.endswith(_IMAGES) else f"source/{path}.md"


def _relinked(text: str, source: str, page: str) -> str:
    """`text` of the repository file `source` with its links as the site's page `page` needs them."""

    def link(match: re.Match[str]) -> str:
        opening, target, closing = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        outside = _outside(target, source)
        if path in _PAGES:
            path = _PAGES[path]
        elif outside:
            path = _site_name(outside)
        else:
            path = path.removeprefix("docs/")
        return opening + posixpath.relpath(path, posixpath.dirname(page) or ".") + closing

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def _published(config: Any, path: str, name: str) -> File:
    """A file of the repository as a file of the site: images as they are, folders as a list, text highlighted."""
    here = ROOT / path
    if path.endswith(_IMAGES):
        return File.generated(config, name, content=here.read_bytes())
    head = f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# {path}\n\n"
    if here.is_dir():
        listed = "\n".join(
            f"- `{file.name}`" for file in sorted(here.iterdir()) if not file.name.startswith((".", "__py"))
        )
        return File.generated(config, name, content=head + listed)
    language = _LANGUAGES.get(here.suffix, "text")
    text = here.read_text()
    shown = text if len(text) < 100_000 else text[:100_000] + "\n...\n"
    return File.generated(config, name, content=f"{head}~~~~{language}\n{shown}\n~~~~\n")
