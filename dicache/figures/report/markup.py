"""HTML that is safe by construction: text is escaped unless it was made here."""

from collections.abc import Iterable
from html import escape

VOID = ("br", "img", "input", "link", "meta")  # elements without an end


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Iterable[str]


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        children: Texts, which are escaped, and `Markup`, which is not; or collections of these.
        attributes: A name may end in `_` where it is a word of Python, and has `_` for `-`. True is an attribute
            without a value; one that is None or False is left out.
    """
    opening = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Return children one after another."""
    parts = (part for child in children for part in ([child] if isinstance(child, str) else child))
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
