"""Small plots as SVG text: a frame with ticks, lines, dots, bars. Colours are CSS classes, so a page themes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 36.0  # room for ticks and titles
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        low, high: its ends, in units of the data; low < high, both positive where `log`.
        title: what it shows, with the unit.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    title: str = ""
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], title: str, log: bool = False) -> Axis:
        """An axis that holds all values with a little room; logarithmic only where they are positive and differ enough."""
        found = list(values)
        low, high = min(found), max(found)
        if log and low > 0.0 and high > 3.0 * low:
            return cls(low / 1.15, high * 1.15, title, True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, title)

    def place(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers between the ends, about five."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            numbers = [k * 10.0**decade for decade in decades for k in (1, 2, 5)]
            inside = [number for number in numbers if self.low <= number <= self.high]
            round_ones = inside if len(inside) <= 6 else [n for n in inside if f"{n:e}".startswith("1.0")]
            return round_ones[:: -(-len(round_ones) // 8)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
        first = math.ceil(self.low / step)
        numbers = [k * step for k in range(first, math.floor(self.high / step) + 1)]
        return [number for number in numbers if self.low <= number <= self.high]


@dataclass
class Plot:
    """An SVG in the making; texts are escaped.

    Attributes:
        x, y: its axes.
        label: what the picture shows, for those who do not see it.
    """

    x: Axis
    y: Axis
    label: str
    _parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point of the data."""
        return (
            LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM),
        )

    def line(self, points: Sequence[Point], style: str = "line") -> None:
        """A line through points."""
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (self.at(*p) for p in points))
        self._parts.append(f'<polyline class="{style}" points="{path}"/>')

    def dots(self, points: Sequence[Point], style: str = "dot") -> None:
        """A dot at each point, with its figures as tooltip."""
        for x, y in points:
            px, py = self.at(x, y)
            told = f"<title>{x:.4g}, {y:.4g}</title>"
            self._parts.append(f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="3">{told}</circle>')

    def bars(self, heights: Sequence[float], low: float, high: float) -> None:
        """Bars of equal width between two ends, as one path that stands on the x axis."""
        floor, count = HEIGHT - BOTTOM, len(heights)
        edges = [self.at(low + i * (high - low) / count, self.y.low)[0] for i in range(count + 1)]
        tops = [self.at(self.x.low, height)[1] for height in heights]
        steps = "".join(f"V{top:.1f}H{edge:.1f}" for top, edge in zip(tops, edges[1:], strict=True))
        self._parts.append(f'<path class="bar" d="M{edges[0]:.1f},{floor:.1f}{steps}V{floor:.1f}Z"/>')

    def mark(self, x: float, text: str = "") -> None:
        """A vertical line with a tooltip; none outside of the axis."""
        if not self.x.low <= x <= self.x.high:
            return
        px, told = self.at(x, self.y.low)[0], f"<title>{escape(text)}</title>"
        self._parts.append(f'<path class="mark" d="M{px:.1f},{TOP:.1f}V{HEIGHT - BOTTOM:.1f}">{told}</path>')

    def rug(self, places: Iterable[float]) -> None:
        """Short lines that stand on the x axis."""
        inside = (self.at(x, self.y.low)[0] for x in places if self.x.low <= x <= self.x.high)
        path = "".join(f"M{px:.1f},{HEIGHT - BOTTOM:.1f}v-6" for px in inside)
        self._parts.append(f'<path class="rug" d="{path}"/>' if path else "")

    def level(self, y: float, text: str, left: bool = False, below: bool = False) -> None:
        """A dashed horizontal line with its name; none outside of the axis.

        Args:
            left: whether the name stands at the left end, below: whether it stands under the line.
        """
        if not self.y.low <= y <= self.y.high:
            return
        py = self.at(self.x.low, y)[1]
        self._parts.append(f'<path class="level" d="M{LEFT:.1f},{py:.1f}H{WIDTH - RIGHT:.1f}"/>')
        px, anchor = (LEFT + 4, "start") if left else (WIDTH - RIGHT, "end")
        self._parts.append(_text(px, py + (11 if below else -4), text, anchor))

    def __html__(self) -> str:
        """The picture."""
        head = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(self.label)}">'
        return Markup("".join((head, *self._frame(), *self._parts, "</svg>")))

    def _frame(self) -> list[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts: list[str] = []
        for tick in self.y.ticks():
            py = self.at(self.x.low, tick)[1]
            parts += [f'<path class="grid" d="M{LEFT:.1f},{py:.1f}H{right:.1f}"/>']
            parts += [_text(LEFT - 6, py + 3.5, _figure(tick), "end")]
        for tick in self.x.ticks():
            px = self.at(tick, self.y.low)[0]
            parts += [_text(px, bottom + 14, _figure(tick), "middle")]
        parts += [f'<path class="axis" d="M{LEFT:.1f},{bottom:.1f}H{right:.1f}"/>']
        parts += [_text((LEFT + right) / 2, HEIGHT - 6, self.x.title, "middle")]
        turn = f'<g transform="translate(11,{(TOP + bottom) / 2:.1f}) rotate(-90)">'
        return [*parts, turn, _text(0, 0, self.y.title, "middle"), "</g>"]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(value: float) -> str:
    """A tick, short.

    >>> _figure(0.0005), _figure(1e-7), _figure(-0.0), _figure(20000)
    ('5e-4', '1e-7', '0', '2e4')
    """
    if value == 0.0 or 1e-3 <= abs(value) < 1e4:
        return f"{value + 0.0:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
