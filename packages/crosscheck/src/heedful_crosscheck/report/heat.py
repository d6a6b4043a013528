"""Where a failure's error is, as SVG to stand in HTML: the darker, the larger."""

from itertools import groupby

from markupsafe import Markup

from heedful_crosscheck.location import HeatMap

CELL, LINE, MARGIN = 6, 10, 56  # in the drawing's own units; to the left of the cells stand names
SCALE = 1.6  # pixels, where there is room


def draw(heat: HeatMap, tensor: str) -> Markup:
    """A figure element with its caption."""
    width = MARGIN + CELL * max(map(len, heat.cells))
    height = LINE * len(heat.cells)
    paths: dict[str, str] = {}
    for n, line in enumerate(heat.cells):
        at = MARGIN
        for shade, cells in groupby(line, lambda x: "bad" if x is None else f"s{heat.shade(x)}"):
            run = CELL * len(list(cells))
            if shade != "s0":
                square = f"M{at} {LINE * n}h{run}v{LINE}h-{run}z"
                paths[shade] = paths.get(shade, "") + square
            at += run
    names = Markup("").join(
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
            MARGIN - 4, LINE * n + LINE - 2.5, heat.label(n)
        )
        for n in range(len(heat.cells))
    )
    drawn = Markup("").join(
        Markup('<path class="{}" d="{}"/>').format(shade, path) for shade, path in paths.items()
    )
    caption = _caption(heat, tensor)
    return Markup(
        '<figure class="heat">'
        '<svg viewBox="0 0 {} {}" width="{:.0f}" role="img" aria-label="{}">{}{}</svg>'
        "<figcaption>{}</figcaption></figure>"
    ).format(width, height, SCALE * width, caption, names, drawn, caption)


def _caption(heat: HeatMap, tensor: str) -> str:
    each = heat.first_column[1] - heat.first_column[0]
    of_each = f"{heat.columns}, {each} a cell" if each > 1 else heat.columns
    strange = any(x is None for line in heat.cells for x in line)
    mark = "; black is not finite" if strange else ""
    return f"Where {tensor} is off: {heat.lines} by {of_each}; the darkest is {heat.largest:.2g}{mark}."
