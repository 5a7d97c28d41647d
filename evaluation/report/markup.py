"""HTML building blocks of the report page: text, tables, images. They know nothing of faces.

Whatever comes from outside goes through `escape_text`. A page loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

# Control characters, which HTML forbids, and Unicode's bidirectional overrides, with which a file
# name could reverse the text around it.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_STYLE = Path(__file__).with_name("report.css")
# No script and no network: even a name that escaped `escape_text` could do nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"

# An image is encoded with the first of these (longest side in pixels, WebP quality) that makes it
# small enough. Faces of noise need the last one.
_SIZES = ((224, 82), (224, 60), (160, 50), (96, 40))
_IMAGE_BYTES = 12_000


def escape_text(value: object) -> str:
    """Any value as HTML text, with markup and unsafe characters made harmless.

    Bytes of file names that are not UTF-8 (lone surrogates in Python) become U+FFFD.
    """
    clean = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return html.escape(_UNSAFE.sub("\ufffd", clean))


def isolated_name(value: object) -> str:
    """A name from outside in a <bdi>: right-to-left letters in it do not reorder the sentence."""
    return f"<bdi>{escape_text(value)}</bdi>"


def percent(value: float, digits: int = 3) -> str:
    """A fraction in per cent: 0.5 is "50.000 %"."""
    return f"{100 * value:.{digits}f} %"


def html_table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    text_columns: int = 1,
    region: str = "",
) -> str:
    """A table with a caption, in a region that scrolls sideways if it is wider than the page.

    The first cell of a row is its header. The first `text_columns` columns hold text, the others
    numbers. `region` distinguishes, for screen readers, tables with the same caption.
    """
    classes = ["" if i < text_columns else ' class="number"' for i in range(len(head))]
    titles = "".join(
        f'<th scope="col"{css}>{escape_text(title)}</th>'
        for css, title in zip(classes, head, strict=True)
    )
    label = escape_text(f"{caption}: {region}" if region else caption)
    table_class = "numbers" if text_columns == 1 else "words"
    body = []
    for row in rows:
        first, *rest = map(escape_text, row)
        cells = zip(classes[1:], rest, strict=True)
        body.append(
            f'<tr><th scope="row">{first}</th>'
            + "".join(f"<td{css}>{cell}</td>" for css, cell in cells)
            + "</tr>"
        )
    # tabindex: a region that scrolls must be reachable by keyboard.
    return (
        f'<section class="scroll" aria-label="{label}" tabindex="0"><table class="{table_class}">'
        f"<caption>{escape_text(caption)}</caption><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></section>"
    )


def inline_image(pixels: np.ndarray, alt: str) -> str:
    """An <img> with its WebP inside, 12 KB at most as a rule; pixels (h, w, 3) uint8 RGB."""
    for side, quality in _SIZES:
        scale = min(1.0, side / max(pixels.shape[:2]))
        size = [max(1, round(scale * length)) for length in pixels.shape[1::-1]]
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        data = cv2.imencode(".webp", small[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
        if len(data) <= _IMAGE_BYTES:
            break
    code = base64.b64encode(data).decode()
    return (
        f'<img src="data:image/webp;base64,{code}" alt="{escape_text(alt)}" width="{size[0]}" '
        f'height="{size[1]}" decoding="async">'
    )


def plot_grid(figures: Iterable[tuple[str, str]], css: str = "") -> str:
    """Plots side by side, as many as the page is wide: (SVG, caption as markup) each.

    css "two" means two columns at most.
    """
    body = "".join(
        f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in figures
    )
    return f'<div class="plots {css}">{body}</div>'


def html_section(level: int, anchor: str, title: str, *content: str) -> str:
    """A section with a heading that links can point at; those of level 2 are ARIA landmarks."""
    landmark = f' aria-labelledby="{anchor}-title"' if level == 2 else ""
    return (
        f'<section id="{anchor}"{landmark}>'
        f'<h{level} id="{anchor}-title">{escape_text(title)}</h{level}>{"".join(content)}</section>'
    )


def html_paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape_text(text)}</p>"


def html_page(title: str, header: str, contents: Sequence[tuple[str, str]], main: str) -> str:
    """A complete page; contents are the (anchor, title) of its table of contents."""
    links = "".join(
        f'<li><a href="#{anchor}">{escape_text(label)}</a></li>' for anchor, label in contents
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape_text(title)}</title>
<style>
{_STYLE.read_text("utf-8")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header><h1>{escape_text(title)}</h1>{header}</header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">{main}</main>
</body>
</html>
"""
