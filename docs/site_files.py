"""A hook of mkdocs: pages may link to files of the repository that lie outside of docs/.

On a code host such a link opens the file. In the site, pictures are copied into `repository/`, and
links to other files become plain text, because the site does not hold the repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
COPIED = "repository"
PICTURES = {".png", ".svg", ".jpg"}
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#]+)\)")


def outside_path(page: str, link: str) -> str | None:
    """Return a link's path in the repository; None where it stays inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures that pages show from outside."""
    added: set[str] = set()
    for file in list(files.documentation_pages()):
        for _, _, link in OUTSIDE.findall(file.content_string):
            path = outside_path(file.src_uri, link)
            if path is not None and Path(path).suffix in PICTURES and path not in added:
                added.add(path)
                source = str(ROOT / path)
                files.append(File.generated(config, f"{COPIED}/{path}", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point pictures at their copies, and leave the words of other links."""

    def rewrite(match: re.Match[str]) -> str:
        mark, words, link = match.groups()
        path = outside_path(page.file.src_uri, link)
        if path is None:
            return match.group()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {link} does not exist")
        if Path(path).suffix not in PICTURES:
            return words
        up = posixpath.relpath(f"{COPIED}/{path}", posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{words}]({up})"

    return OUTSIDE.sub(rewrite, markdown)
