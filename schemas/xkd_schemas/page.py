"""HTML pages in one file: no script, nothing that is fetched, and hostile text shown as what it is.

Style and drawings are in the file. `escape_text` shows control and bidirectional characters as code points, jinja2
escapes every value, and the policy of `page.html.j2`, which every page extends, forbids scripts and requests.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from rich.filesize import decimal

_SKIN_TONES: Final = frozenset(map(chr, range(0x1F3FB, 0x1F400)))


def render_page(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> bytes:
    """The page that a template makes of the values; it has the filters visible, flatten and size, and those given."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"visible": escape_text, "flatten": flatten, "size": format_size, **filters}
    return environment.get_template(template.name).render(**values).encode()


def escape_text(text: str) -> str:
    """The text with nothing in it that a terminal obeys; blanks and all else stay.

    Control, format, surrogate, private and unassigned characters, line separators and combining marks without a base
    are written as their code point; joiners inside emoji too, as terminals disagree on them.

    >>> escape_text("a\\x1b[0m\\u202eb")
    'a\\\\x1b[0m\\\\u202eb'
    """
    shown = []
    for at, char in enumerate(text):
        category = unicodedata.category(char)
        joins = category[0] == "M" or char in _SKIN_TONES
        loose = joins and (at == 0 or text[at - 1].isspace())
        escape = category[0] == "C" or category in {"Zl", "Zp"} or loose
        shown.append(_escape(char) if escape else char)
    return "".join(shown)


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_size(size: float) -> str:
    """A size in steps of 1000, such as 1.2 MB."""
    return decimal(round(size))


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf.

    >>> list(flatten({"a": {"b": 1}, "c": ["x", {"d": None}]}))
    [('a.b', '1'), ('c.0', 'x'), ('c.1.d', 'null')]
    """
    if isinstance(value, list) and all(not isinstance(item, dict | list) for item in value) and prefix.count(".") == 1:
        value = ", ".join(map(str, value)) or "none"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield prefix.rstrip("."), value if isinstance(value, str) else json.dumps(value)
        return
    for key, item in items:
        yield from flatten(item, f"{prefix}{key}.")
