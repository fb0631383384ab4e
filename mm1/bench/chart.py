"""Markup and charts of a page that needs nothing else: escaped HTML, SVG as wide as the page.

Lengths along a chart are percentages, so that it fits a phone and its text keeps its size. Colours say nothing that
words, marks or dashes do not say too.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

STYLE = Path(__file__).with_name("chart.css")
PALETTE = 6  # classes c0, c1, … of the style
NUMBER = re.compile(r"|[\d.]+( … [\d.]+)?( [\w/%]+)?")
Text = Callable[[float], str]
Cell = object | tuple[str, str]


class Html(str):
    """Markup, which is not escaped again."""

    def __add__(self, other: str) -> "Html":
        return joined([self, other])


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """class_ is class, stroke_width is stroke-width; an attribute that is None is left out."""
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    words = "".join(f' {k}="{html.escape(str(v))}"' for k, v in given.items())
    return Html(f"<{name}{words}>{joined(inside)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def document(title: str, intro: str, sections: dict[str, Html]) -> str:
    links = [tag("a", name, href=f"#{anchor(name)}") for name in sections] if len(sections) > 1 else []
    parts = [tag("section", tag("h2", name, id=anchor(name)), inside) for name, inside in sections.items()]
    head = [tag("title", title), tag("style", Html(STYLE.read_text()))]
    metas = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = tag("body", tag("h1", title), tag("p", intro), tag("nav", *links), *parts)
    return f'<!doctype html>\n<html lang="en"><head>{metas}{joined(head)}</head>\n{body}</html>\n'


def anchor(*names: str) -> str:
    return re.sub(r"\W+", "-", " ".join(names))


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], summary: str = "Numbers") -> Html:
    """Folded, scrolling in its box; columns of numbers are set to the right. A cell is a text, or that and a class."""
    cells = [[x if isinstance(x, tuple) else (str(x), "") for x in row] for row in rows]
    kinds = ["" if all(NUMBER.fullmatch(text) for text, _ in column) else "word" for column in zip(*cells)]
    body = [[tag("td", text, class_=f"{word} {kind}") for (text, kind), word in zip(row, kinds)] for row in cells]
    heads = [tag("th", name, class_=word) for name, word in zip(head, kinds)]
    whole = tag("table", tag("tr", *heads), *(tag("tr", *row) for row in body))
    return fold(summary, tag("div", whole, class_="scroll", tabindex=0))


def fold(summary: str, inside: Html) -> Html:
    return tag("details", tag("summary", summary), inside)


def digits(x: float | None, n: int = 3) -> str:
    """In n significant digits and never with an exponent; nothing for None."""
    if not x:
        return "" if x is None else "0"
    x = float(f"{x:.{n - 1}e}")
    return f"{x:.{max(n - 1 - math.floor(math.log10(abs(x))), 0)}f}"


def short(x: float) -> str:
    return f"{x:g}"


def percent(share: float | None, number: Text = digits) -> str:
    return "" if share is None else f"{number(100 * share)} %"


def si(x: float, unit: str, number: Text = digits) -> str:
    power = min(max(math.floor(math.log10(float(f"{x:.2e}")) / 3), -3), 5) if x else 0
    prefix = ("n", "µ", "m", "", "k", "M", "G", "T", "P")[power + 3]
    return f"{number(x / 1000**power)} {prefix}{unit}"


class Scale(NamedTuple):
    low: float
    high: float
    log: bool = True

    @classmethod
    def of(cls, values: Iterable[float], room: float = 1.15) -> "Scale":
        values = list(values)
        return cls(min(values) / room, max(values) * room)

    def at(self, x: float) -> float:
        """Percent of the way."""
        low, high, x = (math.log(v) for v in (self.low, self.high, x)) if self.log else (self.low, self.high, x)
        return round(100 * (x - low) / (high - low), 2)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values, as many as fit but `most`."""
        if self.log and self.high > 3 * self.low:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = [[m * 10.0**p for p in powers for m in ones] for ones in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5))]
            steps += [[10.0**p for p in powers if p % n == 0] for n in (1, 2, 3, 6)]
        else:
            size = 10.0 ** math.floor(math.log10(self.high - self.low))
            first = lambda m: math.ceil(self.low / size / m)  # noqa: E731
            steps = [[i * size * m for i in range(first(m), first(m) + 50)] for m in (0.2, 0.5, 1, 2, 5)]
        fit = [[x for x in step if self.low * 0.999 <= x <= self.high * 1.001] for step in steps]
        return next((step for step in fit if len(step) <= most), [])


def line(x1: float, y1: object, x2: float, y2: object, kind: str | None = None) -> Html:
    return tag("line", x1=f"{x1}%", y1=y1, x2=f"{x2}%", y2=y2, class_=kind)


def lane(
    who: object, marks: Iterable[Html], says: object, scale: Scale, origin: float, kind: str | None = None
) -> Html:
    """One line of a chart: a name, marks over the ticks, and what they say."""
    ticks = [line(scale.at(x), 0, scale.at(x), "100%") for x in scale.ticks()]
    start = line(scale.at(origin), 0, scale.at(origin), "100%", "one")
    svg = tag("svg", *ticks, *marks, start, height=22, aria_hidden="true")
    return tag("div", tag("span", who), svg, tag("span", says, class_=f"says {kind or ''}"), class_="lane")


def bar(scale: Scale, origin: float, value: float, low: float, high: float, kind: str) -> list[Html]:
    """From the origin to a value, with its whisker."""
    a, b = sorted((scale.at(origin), scale.at(value)))
    return [tag("rect", x=f"{a}%", y=5, width=f"{b - a:.2f}%", height=12, class_=kind),
            line(scale.at(low), 11, scale.at(high), 11, "whisker")]  # fmt: skip


def axis(scale: Scale, text: Text) -> Html:
    marks = [tag("text", text(x), x=f"{scale.at(x)}%", y=12, text_anchor="middle") for x in scale.ticks()]
    return tag("div", tag("span"), tag("svg", *marks, height=18, aria_hidden="true"), tag("span"), class_="lane axis")


def plot(marks: Iterable[Html], x: Scale, y: Scale, names: tuple[str, str], texts: tuple[Text, Text], height: int,
         at: Sequence[float] | None = None) -> Html:  # fmt: skip
    """Marks in a frame; ticks of x where they are round, or `at` these."""
    grid = []
    for t in y.ticks(height // 28):
        grid += [line(0, f"{100 - y.at(t)}%", 100, f"{100 - y.at(t)}%"),
                 tag("text", texts[1](t), x=-8, y=f"{100 - y.at(t)}%", dy=4, text_anchor="end")]  # fmt: skip
    for t in x.ticks(5) if at is None else at:
        grid += [line(x.at(t), 0, x.at(t), "100%"),
                 tag("text", texts[0](t), x=f"{x.at(t)}%", y="100%", dy=16, text_anchor="middle")]  # fmt: skip
    named = tag("text", names[0], x="100%", y="100%", dy=32, text_anchor="end"), tag("text", names[1], x=-56, y=-10)
    role = {"role": "img", "aria_label": f"{names[1]} against {names[0]}"}
    return tag("svg", *grid, *named, *marks, height=height, class_="plot", **role)


def polyline(points: Sequence[tuple[float, float, float, float]], x: Scale, y: Scale, kind: str) -> Html:
    """Joined points (x, y, low, high) with whiskers."""
    at = [(x.at(p[0]), *(f"{100 - y.at(v):.2f}%" for v in p[1:])) for p in points]
    joins = [line(a[0], a[1], b[0], b[1], "way") for a, b in pairwise(at)]
    whiskers = [line(a, low, a, high, "whisker") for a, _, low, high in at]
    return tag("g", *joins, *whiskers, *(tag("circle", cx=f"{p[0]}%", cy=p[1], r=3.5) for p in at), class_=kind)


def legend(names: Iterable[str]) -> Html:
    """Of ways in the colours and dashes c0, c1, …"""
    swatches = (tag("svg", line(0, 5, 100, 5, "way"), class_=f"c{i % PALETTE}", aria_hidden="true") for i in range(99))
    return tag("div", *(tag("span", swatch, name, class_="key") for swatch, name in zip(swatches, names)))


def stack(shares: dict[str, float]) -> Html:
    """Shares of a whole, side by side; their colours are c0, c1, …"""
    parts, start = [], 0.0
    for i, share in enumerate(shares.values()):
        parts.append(tag("rect", x=f"{start:.2f}%", width=f"{100 * share:.2f}%", height=22, class_=f"c{i}"))
        start += 100 * share
    swatch = lambda i: tag("svg", tag("rect", width="100%", height=10, class_=f"c{i}"), aria_hidden="true")  # noqa: E731
    keys = [
        tag("span", swatch(i), f"{name} {percent(share)}", class_="key")
        for i, (name, share) in enumerate(shares.items())
    ]
    return tag("svg", *parts, height=22, class_="stack", aria_hidden="true") + tag("div", *keys)
