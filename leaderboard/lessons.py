"""A paper's README as a safe HTML fragment that needs nothing but itself.

Raw HTML in the text is shown as text. Pictures of the paper's directory are inlined; a picture from
the network becomes a link, so that the page makes no request. Links to another paper's directory
lead to its page; links to files of the repository keep their text and name the file.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

PICTURES = {
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
LARGEST_PICTURE = 4 * 2**20  # bytes


def picture_uri(path: Path, root: Path) -> str | None:
    """A picture file as a `data:` address; None if it is missing, too large or outside `root`.

    Inside `<img>` an SVG can neither run scripts nor load anything.
    """
    kind = PICTURES.get(path.suffix.lower())
    try:
        found, root = path.resolve(), root.resolve()
        inside = root == found or root in found.parents
        if kind is None or not inside or found.stat().st_size > LARGEST_PICTURE:
            return None
        return f"data:{kind};base64,{base64.b64encode(found.read_bytes()).decode()}"
    except OSError:
        return None


def render_lesson(text: str, directory: Path, pages: dict[str, str] | None = None) -> str:
    """Markdown to HTML.

    Args:
        text: CommonMark with tables.
        directory: where relative addresses start; nothing outside it is read.
        pages: directory name of a paper -> address of its page.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            _demote(token, tokens[index + 1], tokens[index + 2])
        for child in token.children or []:
            if child.type == "link_open":
                _mend_link(child, pages or {})
            if child.type == "image":
                _mend_picture(child, directory)
    return parser.renderer.render(tokens, parser.options, {})


def _demote(opening: Token, inline: Token, closing: Token) -> None:
    """A README's `#` becomes the page's `<h3>`; headings can be linked to."""
    level = min(int(opening.tag[1]) + 2, 6)
    opening.tag = closing.tag = f"h{level}"
    opening.attrSet("id", "lesson-" + _slug(inline.content))


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")


def _mend_link(token: Token, pages: dict[str, str]) -> None:
    address = urlsplit(str(token.attrGet("href") or ""))
    if address.scheme in ("http", "https"):
        token.attrSet("rel", "noopener noreferrer")
    elif not address.path and address.fragment:
        token.attrSet("href", "#lesson-" + _slug(unquote(address.fragment)))
    elif address.scheme != "mailto":
        parts = [part for part in unquote(address.path).split("/") if part not in ("", ".", "..")]
        paper = next((part for part in parts if part in pages), None)
        if paper and parts[-1] in (paper, "README.md"):
            token.attrSet("href", pages[paper])
            return
        del token.attrs["href"]
        where = f", {address.fragment}" if address.fragment else ""
        token.attrSet("title", unquote(address.path) + where)
        token.attrSet("class", "file")


def _mend_picture(token: Token, directory: Path) -> None:
    source = str(token.attrGet("src") or "")
    address = urlsplit(source)
    uri = None
    if not address.scheme and not address.netloc:
        uri = picture_uri(directory / unquote(address.path), directory)
    if uri:
        token.attrSet("src", uri)
        return
    words = token.content or "picture"
    token.type, token.tag, token.nesting = "text", "", 0
    token.content = f"[{words}: not part of this page, {source}]"
    token.children = None
