"""A plot of the report page as inline SVG: text stays text, colours are CSS variables.

    markup = svg_plot("DET curve", draw_det, curve, metrics)

matplotlib knows colours, not CSS variables, so plots are drawn in the fixed colours of
`_VARIABLES`, and those are then replaced by --ink, --grid, --a and --b. The page can thus have a
dark mode.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from evaluation.drawing import GENUINE_COLOUR, IMPOSTOR_COLOUR

# Placeholders for the page's own colours: values that nothing else is drawn in.
INK, GRID = "#010203", "#040506"
_VARIABLES = {GENUINE_COLOUR: "--a", IMPOSTOR_COLOUR: "--b", INK: "--ink", GRID: "--grid"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
WIDTH, HEIGHT = 4.6, 3.1  # inches of 72 points; a phone shows them at about this size
_numbers = itertools.count()


def svg_plot(title: str, draw: Callable[..., None], *args: Any, height: float = HEIGHT) -> Markup:
    """The markup of a plot, drawn by one of drawing's functions with these arguments.

    Screen readers read it as an image with this title. The style is the page's, whatever the user's
    matplotlibrc says.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        # Transparent: the page's background shows, light or dark.
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, INK, *args)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)
    return _in_page(file.getvalue(), title)


def _in_page(text: str, title: str) -> Markup:
    """matplotlib's SVG file as an element of the page."""
    text = text[text.index("<svg") :]  # without the XML declaration, which HTML does not allow here
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # matplotlib's ids repeat from figure to figure ("axes_1"); in one page they must be unique, and
    # references to them follow.
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    title = html.escape(title)
    head = f'<svg class="plot" role="img" aria-label="{title}" viewBox="0 0 {size[1]} {size[2]}">'
    return Markup(head + text[text.index(">") + 1 :].strip())
