"""What the page is made of: paragraphs, tables, plots and galleries, as data for report.html.

The template escapes every value; only Markup (plots and images made here) goes in as it is.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import jinja2
import numpy as np
from markupsafe import Markup

# Control characters, which HTML forbids, and Unicode's bidirectional overrides, with which a file
# name could reverse the text around it.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")

# An image is encoded with the first of these (longest side in pixels, WebP quality) that makes it
# small enough. Faces of noise need the last one.
_SIZES = ((224, 82), (224, 60), (160, 50), (96, 40))
IMAGE_BYTES = 12_000


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its header.

    The first `text_columns` columns hold text, the others numbers. `region` distinguishes, for
    screen readers, tables with the same caption.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    text_columns: int = 1
    region: str = ""


@dataclasses.dataclass(frozen=True)
class Plots:
    """Plots side by side, (SVG, caption) each; columns "two" means two at most."""

    kind: ClassVar[str] = "plots"
    plots: Sequence[tuple[Markup, str]]
    columns: str = ""


@dataclasses.dataclass(frozen=True)
class Card:
    """Faces in a gallery, (images, name) each; `names` end the caption."""

    faces: Sequence[tuple[Sequence[Markup], str]]
    rank: int = 0
    caption: str = ""
    names: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Cards side by side."""

    kind: ClassVar[str] = "gallery"
    cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class Group:
    """Blocks that are "beside" each other, or "details" under a summary, folded away at first."""

    kind: str
    blocks: Sequence[Any]
    summary: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section with a heading that links can point at, and sections inside it."""

    anchor: str
    title: str
    blocks: Sequence[Any]
    sections: Sequence[Section] = ()
    contents: str = ""  # what the table of contents calls it, by default the title


def percent(value: float, digits: int = 3) -> str:
    """A fraction in per cent: 0.5 is "50.000 %"."""
    return f"{100 * value:.{digits}f} %"


def inline_image(pixels: np.ndarray, alt: str) -> Markup:
    """An <img> with its WebP inside, 12 KB at most as a rule; pixels (h, w, 3) uint8 RGB."""
    for side, quality in _SIZES:
        scale = min(1.0, side / max(pixels.shape[:2]))
        size = [max(1, round(scale * length)) for length in pixels.shape[1::-1]]
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        data = cv2.imencode(".webp", small[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
        if len(data) <= IMAGE_BYTES:
            break
    image = '<img src="data:image/webp;base64,{}" alt="{}" width="{}" height="{}" decoding="async">'
    return Markup(image).format(base64.b64encode(data).decode(), make_safe(alt), *size)


def make_safe(value: object) -> object:
    """Any value as text without unsafe characters; markup stays as it is.

    Bytes of file names that are not UTF-8 (lone surrogates in Python) become U+FFFD.
    """
    if isinstance(value, Markup):
        return value
    clean = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return _UNSAFE.sub("\ufffd", clean)


def render_page(title: str, model: str, sections: Iterable[Section]) -> str:
    """The page, whose template is report.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=make_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        title=title, model=model, sections=list(sections)
    )
