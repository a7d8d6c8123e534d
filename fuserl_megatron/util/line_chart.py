"""Lines over steps as SVG, without a script: axes with units, a legend, colours for light and dark pages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888", "#ee8866")
"""A palette that colour-blind people can tell apart."""
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 560, 240, 62, 24, 34, 10
MOST_POINTS = 400
DASHED = "validation"
"""A line whose name ends with this is dashed, and has the colour of the line without it (or with `train`)."""

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], unit: str, x_unit: str = "step") -> str:
    """One line a series, names in a legend below. Values that are not finite are left out.

    Args:
        series: name -> (x, y), x ascending. More than MOST_POINTS are averaged in equal pieces.
        unit: of y.
        x_unit: of x.

    Returns:
        SVG and its legend as HTML; a sentence where there is nothing to draw.
    """
    drawn = {name: thinned([(x, y) for x, y in points if math.isfinite(y)]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return "<p>No values.</p>"
    xs, ys = ([p[i] for points in drawn.values() for p in points] for i in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, x1, y0, y1 = x_ticks[0], max(xs), y_ticks[0], y_ticks[-1]
    x_ticks = [x for x in x_ticks if x <= x1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0 or 1)
        up = (y - y0) / (y1 - y0 or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        _, down = place(x0, y)
        parts.append(f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in x_ticks:
        across, _ = place(x, y0)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{x:.6g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_unit)}</text>')
    colours = _colours(drawn)
    for name, points in drawn.items():
        way = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in points))
        dots = "".join(f'<circle cx="{a}" cy="{b}" r="3"/>' for a, b in (place(*p) for p in points[:1]))
        shape = dots if len(points) == 1 else f'<polyline points="{way}"/>'
        dashes = ' stroke-dasharray="6 4"' if name.endswith(DASHED) else ""
        parts.append(f'<g stroke="{colours[name]}" fill="none"{dashes}>{shape}</g>')
    last = {name: points[-1][1] for name, points in drawn.items()}
    legend = "".join(
        f'<span><i style="background:{colours[name]}"></i>{escape(name)} {value:.4g}</span>'
        for name, value in last.items()
    )
    label = escape(f"{', '.join(drawn)} in {unit} by {x_unit}", quote=True)
    svg = f'<svg class=chart viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{escape(unit)}; last values: {legend}</figcaption></figure>"


def _colours(names: Iterable[str]) -> dict[str, str]:
    """One a name; a name with DASHED behind it has the colour of the name without."""
    found: dict[str, str] = {}
    for name in names:
        bare = name.removesuffix(DASHED).removesuffix("train").strip()
        found.setdefault(bare, COLOURS[len(found) % len(COLOURS)])
    return {name: found[name.removesuffix(DASHED).removesuffix("train").strip()] for name in names}


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points: means of equal pieces, so that a spike still shows in its piece's height."""
    if len(points) <= most:
        return points
    size = len(points) / most
    pieces = [points[int(i * size) : int((i + 1) * size)] for i in range(most)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    span = high - low or abs(low) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
