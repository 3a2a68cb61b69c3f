"""mkdocs hooks: pages from outside docs/, links to files that are no pages, formulas."""

import re
from html import unescape
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files outside docs/ that are pages of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "reproduction/README.md": "laboratory.md",
    "reproduction/LOG.md": "log.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """
    Let links that hold on the page's own place in the repository hold on the site.

    A link to a file that is no page, such as one of code, becomes the file's name.
    """
    sources = {at: source for source, at in PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")

    def resolve(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        path = normpath(PurePosixPath(source).parent / target)
        if not (ROOT / path).exists():
            return match[0]
        at = PAGES.get(path)
        if at is None and path.startswith("docs/"):
            at = path.removeprefix("docs/")
        if at is not None:
            return f"[{text}]({relpath(at, PurePosixPath(uri).parent)}{anchor})"
        return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"

    link = r"\[(?P<text>[^\[\]]+)\]\((?P<target>[^()#:\s]+)(?P<anchor>#[^()\s]*)?\)"
    return re.sub(link, resolve, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Turn formulas, which arithmatex has marked, into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "inline" if match["tag"] == "span" else "block"
        return convert(unescape(match["latex"]), display=display)

    marked = (
        r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>'
    )
    return re.sub(marked, formula, html, flags=re.DOTALL)
