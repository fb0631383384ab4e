"""Make an HTML page that needs no other file, with tables and rounded numbers."""

import html
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")
NUMBER = re.compile(r"|[\d.]+( … [\d.]+)?( [\w/%]+)?")
Cell = object | tuple[str, str]


class Html(str):
    """Hold markup, which is not escaped again."""


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """Return an element. The attribute class_ is written as class, and attributes that are None are omitted."""
    words = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{words}>{joined(inside)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    """Return the concatenated parts, escaped unless they are markup."""
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def document(title: str, intro: str, sections: dict[str, Html]) -> str:
    """Return a page with a section for each name, and links to the sections if there are several."""
    links = [tag("a", name, href=f"#{anchor(name)}") for name in sections] if len(sections) > 1 else []
    parts = [tag("section", tag("h2", name, id=anchor(name)), inside) for name, inside in sections.items()]
    head = [tag("title", title), tag("style", Html(STYLE.read_text()))]
    metas = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = tag("body", tag("h1", title), tag("p", intro), tag("nav", *links), *parts)
    return f'<!doctype html>\n<html lang="en"><head>{metas}{joined(head)}</head>\n{body}</html>\n'


def anchor(*names: str) -> str:
    """Return the id of a heading with these words."""
    return re.sub(r"\W+", "-", " ".join(names))


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], summary: str = "Numbers") -> Html:
    """Return a folded table that scrolls in its own box. A cell is a text, or a text with its class."""
    cells = [[x if isinstance(x, tuple) else (str(x), "") for x in row] for row in rows]
    kinds = ["" if all(NUMBER.fullmatch(text) for text, _ in column) else "word" for column in zip(*cells)]
    body = [[tag("td", text, class_=f"{word} {kind}") for (text, kind), word in zip(row, kinds)] for row in cells]
    heads = [tag("th", name, class_=word) for name, word in zip(head, kinds)]
    whole = tag("table", tag("tr", *heads), *(tag("tr", *row) for row in body))
    return fold(summary, tag("div", whole, class_="scroll", tabindex=0))


def fold(summary: str, inside: Html) -> Html:
    """Return an element that shows only its summary until the reader opens it."""
    return tag("details", tag("summary", summary), inside)


def digits(x: float | None, n: int = 3) -> str:
    """Return a number with n significant digits and without an exponent, or an empty text for None."""
    if not x:
        return "" if x is None else "0"
    x = float(f"{x:.{n - 1}e}")
    return f"{x:.{max(n - 1 - math.floor(math.log10(abs(x))), 0)}f}"


def percent(share: float | None) -> str:
    """Return a share as a percentage, or an empty text for None."""
    return "" if share is None else f"{digits(100 * share)} %"


def si(x: float, unit: str) -> str:
    """Return a quantity with an SI prefix, such as "14.6 GB/s"."""
    power = min(max(math.floor(math.log10(float(f"{x:.2e}")) / 3), -3), 5) if x else 0
    prefix = ("n", "µ", "m", "", "k", "M", "G", "T", "P")[power + 3]
    return f"{digits(x / 1000**power)} {prefix}{unit}"
