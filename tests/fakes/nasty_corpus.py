"""A corpus of rows that break readers: `write(folder, rows, seed)` gives four files with as many lines as asked for.

Every kind of row has a function of a random generator; each file has one form and begins with one plain row, so that
the form can be told. The last line of each file is cut off in the middle.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from four_tokenizers import SENTENCES
from hostile_text import BIDI, CLUSTERS, INJECTIONS, MARKS, NASTY

MEGABYTE = 1_000_000

Row = Callable[[random.Random, "Shape"], bytes]
Shape = Callable[[str, str], dict[str, Any]]
"""A question and an answer as a row of one file's form."""

SHAPES: dict[str, Shape] = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "pairs": lambda q, a: {"prompt": q, "response": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "text": lambda q, a: {"text": f"{q}\n{a}"},
}


def some_text(chance: random.Random) -> str:
    pools = (NASTY, BIDI, MARKS, INJECTIONS, CLUSTERS, SENTENCES)
    pieces = [chance.choice(chance.choice(pools)) for _ in range(chance.randint(1, 12))]
    pieces += [chr(chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)))) for _ in range(3)]
    chance.shuffle(pieces)
    return chance.choice(("", " ", "\n")).join(pieces)


def _line(row: Any, *, ascii_only: bool = False) -> bytes:
    return json.dumps(row, ensure_ascii=ascii_only).encode()


def _nul(chance: random.Random, shape: Shape) -> bytes:
    line = _line(shape("nul", "a\x00b\x00"), ascii_only=True)
    return line if chance.random() < 0.5 else line.replace(b"\\u0000", b"\0")


def _huge(chance: random.Random, shape: Shape) -> bytes:
    unit = chance.choice(("\u200d", "a\u0301", "é", "東", "🙂", "'", "<|im_start|>", "the keeper "))
    return _line(shape("huge", unit * (20_000 // len(unit.encode()))))


def _missing(chance: random.Random, shape: Shape) -> bytes:
    row = shape("a", "b")
    del row[chance.choice(sorted(row))]
    return _line(row | {"other": 1})


def _wrong_type(chance: random.Random, shape: Shape) -> bytes:
    row = shape("a", "b")
    wrong = (None, True, 0, -1.5e300, [], {}, ["a"], {"text": "a"}, [[["a"]]], [None], [1, "a"], {"role": "user"})
    row[chance.choice(sorted(row))] = chance.choice(wrong)
    return _line(row)


def _deep(chance: random.Random, shape: Shape) -> bytes:
    depth = chance.choice((10, 900, 1_100, 100_000))
    inner = b"[" * depth + b"]" * depth if chance.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    return _line({"deep": "DEEP"} | shape("a", "something deep beside it")).replace(b'"DEEP"', inner)


def _broken(chance: random.Random, shape: Shape) -> bytes:
    line = _line(shape(some_text(chance), "cut off"))
    kind = chance.randrange(4)
    if kind == 0:
        return line[: chance.randrange(len(line))]
    if kind == 1:
        return line + line
    at = chance.randrange(len(line))
    return line[:at] + (bytes([chance.randrange(256)]) if kind == 2 else b'"') + line[at + 1 :]


ROLES = ("user", "assistant", "system", "tool", "User", "", "\x00", "<|im_start|>", "function", "assistant ")
CONTENTS = (
    "", None, 5, [], [{"type": "text", "text": "part"}], [{"type": "text"}], {"a": 1}, [{"type": "image", "url": "x"}],
    [{"type": "text", "text": "a"}, {"type": "text", "text": "\u0301b"}], ["a"],
)  # fmt: skip
TURNS = (None, [], "x", {"role": "assistant"}, {"content": "x"}, {"role": 3, "content": "x"})


def _chat(chance: random.Random, shape: Shape) -> bytes:
    if "messages" not in shape("", ""):
        return _line(shape(some_text(chance), some_text(chance)), ascii_only=chance.random() < 0.5)
    contents = (some_text(chance), *CONTENTS)
    turns: list[Any] = [
        {
            "role": chance.choice(ROLES[: chance.choice((2, 4, 10))]),
            "content": contents[chance.choice((0, 0, 0, chance.randrange(11)))],
        }
        for _ in range(chance.randint(0, 6))
    ]
    if chance.random() < 0.1:
        turns.append(chance.choice(TURNS))
    if chance.random() < 0.1:
        turns.append({"role": "assistant", "content": "calls", "tool_calls": [{"id": 1}]})
    return _line({"messages": turns})


BLANKS = ("", " ", "\n\n", "\u00a0\u3000", "\u200b", "\ufeff", "\x00", "\x1c\x1d", "\u0301")
DIRECTIONS = (*BIDI, "שלום", "مرحبا", " ", "abc")
HALVES = (b"\\ud800", b"\\udfff", b"\\udc00\\ud800", b"\\ud83d \\ude00", b"\\uD83D\\u0041")
BROKEN = (
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\xaf", b"\xe2\x28\xa1", "é".encode("latin-1"),
)  # fmt: skip
NO_OBJECTS = (b"null", b"1", b'"a"', b"[]", b"[{}]", b"true", b"{}", b'{"a"}', b"{,}", b"}", b"{" * 40)
NUMBERS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"1" + b"0" * 400, b"-0", b"01", b"1e-999", b"0x1")

KINDS: dict[str, tuple[Row, int]] = {
    "plain": (lambda c, shape: _line(shape("Who lit the lamp?", f"The keeper, {c.randrange(10**6)} times.")), 80),
    "text": (lambda c, shape: _line(shape(some_text(c), some_text(c)), ascii_only=c.random() < 0.5), 300),
    "marks": (
        lambda c, shape: _line(
            shape("marks", "".join("aé東ب"[n % 4] + "".join(c.choices(MARKS, k=n % 40)) for n in range(60)))
        ),
        30,
    ),
    "direction": (lambda c, shape: _line(shape("direction", "".join(c.choice(DIRECTIONS) for _ in range(60)))), 30),
    "blank": (lambda c, shape: _line(shape(c.choice(BLANKS), c.choice(BLANKS))), 30),
    "between": (lambda c, _shape: c.choice((b"", b" ", b"\t\r", b"\x0b\x0c", b"\xc2\xa0")), 20),
    "nul": (_nul, 20),
    "surrogate": (lambda c, shape: _line(shape("half", "HALF a")).replace(b"HALF", c.choice(HALVES)), 30),
    "paired": (
        lambda c, shape: _line(shape("pair", c.choice("\U0001f44b\U0001d4b3\U0010ffff") * 3), ascii_only=True),
        20,
    ),
    "not_utf8": (lambda c, shape: _line(shape("bytes", "HERE")).replace(b"HERE", c.choice(BROKEN)), 30),
    "bom": (
        lambda c, shape: c.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"")) + _line(shape("\ufeffmark", "in \ufeff it")),
        20,
    ),
    "huge": (_huge, 3),
    "megabyte": (lambda c, shape: _line(shape("a megabyte", c.choice("x0 -\n") * (MEGABYTE - 100))), 2),
    "one_word": (
        lambda c, shape: _line(shape("one word", c.choice(("x", "ab", "0", "\u0301", "'", "-")) * 50_000)),
        2,
    ),
    "too_long": (lambda _c, shape: _line(shape("too long", "y" * (MEGABYTE + 1))), 2),
    "missing": (_missing, 30),
    "extra": (
        lambda c, shape: _line(
            {"": 0, "\x00": [], "prompt ": "x", "__class__": "y", "id": c.random()} | shape("a", "extra keys")
        ),
        30,
    ),
    "wrong_type": (_wrong_type, 50),
    "no_object": (lambda c, _shape: c.choice(NO_OBJECTS), 20),
    "numbers": (
        lambda c, shape: _line({"n": "NUMBER"} | shape("a", "a number beside it")).replace(
            b'"NUMBER"', c.choice(NUMBERS)
        ),
        30,
    ),
    "deep": (_deep, 10),
    "twice": (lambda _c, shape: _line(shape("first", "one"))[:-1] + b", " + _line(shape("second", "other"))[1:], 20),
    "same": (lambda _c, shape: _line({"id": 7} | shape("the same row", "again and again")), 30),
    "windows": (
        lambda c, shape: _line(shape("line ends", "a\r\nb\rc\u2028d\u0085e\x0bf")) + c.choice((b"\r", b"\r\r", b" ")),
        30,
    ),
    "broken": (_broken, 80),
    "noise": (lambda c, _shape: c.randbytes(c.randint(0, 200)), 20),
    "chat": (_chat, 100),
}
"""Kind -> how a row of it is made, and its share."""
LONG = ("huge", "megabyte", "one_word", "too_long")  # seconds of spaCy each: of one form only


def lines(count: int, shape: Shape, seed: int) -> list[bytes]:
    """`count` lines without their ends; the first is plain, every kind occurs where there is room."""
    chance = random.Random(seed)
    kinds = [name for name in KINDS if shape is SHAPES["messages"] or name not in LONG]
    weighted = [name for name in kinds for _ in range(KINDS[name][1])]
    names = kinds[: count - 2] + [chance.choice(weighted) for _ in range(count - 2 - len(kinds))]
    chance.shuffle(names)
    made = [KINDS[name][0](chance, shape).replace(b"\n", b" ") for name in names]
    return [KINDS["plain"][0](chance, shape), *made, _line(shape("cut off", "in the middle of " + "x" * 30))[:-20]]


def write(folder: Path, count: int, seed: int) -> list[Path]:
    """One file for each form, together `count` lines; two of them with byte order mark, two with CRLF."""
    paths = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        end = (b"\n", b"\r\n")[number // 2]
        share = count // len(SHAPES) + (number < count % len(SHAPES))
        content = end.join(lines(share, shape, seed + number))
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_bytes((b"\xef\xbb\xbf" if number % 2 else b"") + content)
    return paths
