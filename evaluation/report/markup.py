"""Small pieces of the report's page: text, tables, images. They know nothing of faces.

Everything that comes from outside goes through `text`; nothing in a page is loaded from anywhere.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

# Characters that no page may hold or that turn a line around: controls, and Unicode's overrides of
# the direction of writing.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_STYLE = Path(__file__).with_name("report.css")
# No script, no network: even a name that slipped through `text` could do nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"

# What images are tried at until they are small enough: longest side in pixels and quality.
_SIZES = ((224, 82), (224, 60), (160, 50), (96, 40))
_IMAGE_BYTES = 12_000


def text(value: object) -> str:
    """Any value as text that a page can hold, with markup and unsafe characters made harmless.

    Bytes of file names that are no UTF-8 (lone surrogates in Python) become U+FFFD.
    """
    clean = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return html.escape(_UNSAFE.sub("\ufffd", clean))


def name(value: object) -> str:
    """A name from an archive, kept apart from the direction of the text around it."""
    return f"<bdi>{text(value)}</bdi>"


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    words: int = 1,
    of: str = "",
) -> str:
    """A table with a caption, in a region that scrolls sideways where it is wider than the page.

    The first cell of a row is its header. The first `words` columns hold words, the others numbers.
    `of` tells regions apart whose captions are the same.
    """
    kinds = ["" if column < words else ' class="number"' for column in range(len(head))]
    columns = zip(kinds, head, strict=True)
    titles = "".join(f'<th scope="col"{kind}>{text(title)}</th>' for kind, title in columns)
    label = text(f"{caption}: {of}" if of else caption)
    look = "numbers" if words == 1 else "words"
    body = []
    for row in rows:
        first, *rest = map(text, row)
        cells = zip(kinds[1:], rest, strict=True)
        body.append(
            f'<tr><th scope="row">{first}</th>'
            + "".join(f"<td{kind}>{cell}</td>" for kind, cell in cells)
            + "</tr>"
        )
    return (
        f'<section class="scroll" aria-label="{label}" tabindex="0"><table class="{look}">'
        f"<caption>{text(caption)}</caption><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></section>"
    )


def image(pixels: np.ndarray, alt: str) -> str:
    """An image element with its WebP in it, no more than some 12 KB; pixels (h, w, 3) uint8 RGB."""
    for side, quality in _SIZES:
        scale = min(1.0, side / max(pixels.shape[:2]))
        size = [max(1, round(scale * length)) for length in pixels.shape[1::-1]]
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        data = cv2.imencode(".webp", small[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
        if len(data) <= _IMAGE_BYTES:
            break
    code = base64.b64encode(data).decode()
    return (
        f'<img src="data:image/webp;base64,{code}" alt="{text(alt)}" width="{size[0]}" '
        f'height="{size[1]}" decoding="async">'
    )


def plots(figures: Iterable[tuple[str, str]], kind: str = "") -> str:
    """Plots side by side as far as the page is wide: (SVG, caption as markup) each.

    kind "two" keeps them in two columns at most.
    """
    body = "".join(
        f"<figure>{svg}<figcaption>{said}</figcaption></figure>" for svg, said in figures
    )
    return f'<div class="plots {kind}">{body}</div>'


def section(level: int, anchor: str, title: str, *content: str) -> str:
    """A section with its heading, which links can point at; those of level 2 are landmarks."""
    named = f' aria-labelledby="{anchor}-title"' if level == 2 else ""
    return (
        f'<section id="{anchor}"{named}>'
        f'<h{level} id="{anchor}-title">{text(title)}</h{level}>{"".join(content)}</section>'
    )


def paragraph(sentence: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{text(sentence)}</p>"


def page(title: str, header: str, contents: Sequence[tuple[str, str]], main: str) -> str:
    """A whole page; contents lists (anchor, title) for its table of contents."""
    links = "".join(f'<li><a href="#{anchor}">{text(label)}</a></li>' for anchor, label in contents)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>
{_STYLE.read_text("utf-8")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header><h1>{text(title)}</h1>{header}</header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">{main}</main>
</body>
</html>
"""
