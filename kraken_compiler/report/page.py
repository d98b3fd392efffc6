"""Puts a page together: sections of texts, tables and pictures, in one file without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        title: What it shows.
        svg: The picture.
        key: Names and colors of what is in it.
    """

    title: str
    svg: Markup
    key: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, title: str, svg: str, key: Sequence[tuple[str, str]] = ()) -> Picture:
        """A picture of SVG that we have drawn, whose texts are escaped."""
        return cls(title, Markup(svg), tuple(key))


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        texts: Paragraphs.
        header, rows: A table; none if the header is empty.
        pictures: Pictures.
    """

    title: str
    texts: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = field(default=())


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML; all texts are escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    return template.render(title=title, subtitle=subtitle, sections=sections)
