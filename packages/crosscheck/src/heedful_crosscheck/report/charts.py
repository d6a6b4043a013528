"""Errors drawn by Matplotlib, as SVG to stand in HTML.

Its colours and its font are the page's, so that it is as readable in the dark: the colours that
Matplotlib is given are stand-ins, which afterwards become the page's variables.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from heedful_crosscheck.run import DTYPES, Outcome

INK, FAINT, WRONG = "#010101", "#020202", "#030303"
HUES = {dtype: f"#04040{n}" for n, dtype in enumerate(DTYPES)}
VARIABLES = {INK: "ink", FAINT: "faint", WRONG: "disagree"} | {
    hue: dtype for dtype, hue in HUES.items()
}
STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"

Point = tuple[float, float, bool]  # an error, plain attention's, and whether it is wrong
Placed = list[tuple[float, list[Point]]]  # where along the axis, and what stands there


def errors(outcomes: Sequence[Outcome], name: str) -> str:
    """Relative RMS errors by dtype and by length, beside plain attention's.

    Args:
        outcomes: whose tensors they are.
        name: of the figure, which no other figure of the page has.

    Returns:
        an SVG element; "" where there is nothing to draw.
    """
    found = [
        (o.dtype, _power(max(o.lengths)), point)
        for o in outcomes
        if o.lengths
        for point in _points(o)
    ]
    if not found:
        return ""
    dtypes = [dtype for dtype in DTYPES if any(dtype == d for d, _, _ in found)]
    powers = sorted({power for _, power, _ in found})
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure((8.6, 2.8))
        shares = len(dtypes) + 0.5, max(len(powers), 3) + 0.5
        by_dtype, by_length = figure.subplots(1, 2, sharey=True, width_ratios=shares)
        figure.subplots_adjust(0.08, 0.16, 0.995, 0.98, wspace=0.02)
        step = 0.8 / len(dtypes)
        for n, dtype in enumerate(dtypes):
            own = [(power, point) for d, power, point in found if d == dtype]
            _draw(by_dtype, [(n, [point for _, point in own])], dtype, width=7)
            aside = (n - (len(dtypes) - 1) / 2) * step
            placed: Placed = [
                (x + aside, [point for p, point in own if p == power])
                for x, power in enumerate(powers)
            ]
            _draw(by_length, placed, dtype, width=4)
        _label(by_dtype, "dtype", dtypes)
        _label(by_length, "the longer of Sq and Sk", [f"≤ {2**power}" for power in powers])
        by_dtype.set_ylabel("relative RMS error")
        return _inline(figure)


def _points(outcome: Outcome) -> Iterable[Point]:
    """Those that a logarithm can show."""
    for judgement in outcome.judgements.values():
        if math.isfinite(judgement.errors.rms) and judgement.errors.rms > 0:
            yield judgement.errors.rms, judgement.plain.rms, bool(judgement.faults)


def _power(length: int) -> int:
    """Of two: the least that is no less, 16 at least."""
    return max(length - 1, 15).bit_length()


def _draw(axes: Axes, placed: Placed, dtype: str, width: float) -> None:
    """At each place from the least to the largest, the middle half, the median; to its right plain's."""
    beside = 0.012 * width
    own = [(x - beside, [error for error, _, _ in points]) for x, points in placed]
    plain = [(x + beside, [p for _, p, _ in points if p > 0]) for x, points in placed]
    for spreads, colour in ((plain, FAINT), (own, HUES[dtype])):
        known = [(x, values) for x, values in spreads if values]
        whole = [(x, x, min(values), max(values)) for x, values in known]
        half = [(x, x, *np.percentile(values, (25, 75))) for x, values in known]
        median = [(x - beside, x + beside, *np.percentile(values, (50, 50))) for x, values in known]
        _lines(axes, whole, colour, 1)
        _lines(axes, half, colour, width / 2)
        _lines(axes, median, colour, 2)
    wrong = [(x - beside, e) for x, points in placed for e, _, is_wrong in points if is_wrong]
    extremes = {(x, f([e for at, e in wrong if at == x])) for x, _ in wrong for f in (min, max)}
    if extremes:
        axes.plot(*zip(*sorted(extremes), strict=True), "x", color=WRONG, clip_on=False)


def _lines(
    axes: Axes, ends: Sequence[tuple[float, float, float, float]], colour: str, width: float
) -> None:
    """From (x, y) to (x, y), as one path, which is short."""
    x = [value for x0, x1, _, _ in ends for value in (x0, x1, math.nan)]
    y = [value for _, _, y0, y1 in ends for value in (y0, y1, math.nan)]
    axes.plot(x, y, color=colour, linewidth=width, solid_capstyle="butt", clip_on=False)


def _label(axes: Axes, title: str, names: Sequence[str]) -> None:
    axes.set_xlabel(title)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", clip_on=False)
    axes.tick_params(length=0)


def _inline(figure: Figure) -> str:
    """The figure as an SVG element that takes its colours and its font from the page."""
    file = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=unsaid)
    root = ElementTree.fromstring(file.getvalue())
    _tidy(root)
    for size in ("width", "height"):
        del root.attrib[size]
    ElementTree.register_namespace("", SVG.strip("{}"))
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    text = re.sub(r"(\d+\.\d)\d+", r"\1", text)  # a tenth of a point is enough
    return re.sub(r"\s+", " ", re.sub(r">\s+<", "><", text))


def _tidy(element: ElementTree.Element) -> None:
    """Leaves out what shows nothing, and what the page says better."""
    for child in list(element):
        _tidy(child)
        nothing = child.tag in (f"{SVG}g", f"{SVG}defs") and not len(child)
        if nothing or child.tag in (f"{SVG}metadata", f"{SVG}style"):
            element.remove(child)
    if element.tag == f"{SVG}g":
        element.attrib.pop("id", None)
    if element.tag == f"{SVG}text":
        anchor = re.search(r"text-anchor: (\w+)", element.attrib.pop("style"))
        element.set("text-anchor", anchor[1] if anchor else "start")
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if link := element.attrib.pop(LINK, None):  # HTML knows no namespaces
        element.set("href", link)
