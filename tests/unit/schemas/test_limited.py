"""Chat templates that take all time or memory are ended and named; what runs in the child leaves its parent alone."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import four_tokenizers
from faulty_disk import exit_code_of
from xkd_schemas.documents import document_of
from xkd_schemas.durable_files import hold_lock
from xkd_schemas.errors import Refused, UsageError
from xkd_schemas.text import limited
from xkd_schemas.text.encode import Encoder
from xkd_schemas.text.limited import Limited

TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOPS = "{% for a in r %}{% for a in r %}{% for a in r %}{% endfor %}{% endfor %}{% endfor %}"
GROW = "{% set n = namespace(x='a', y='a') %}{% for a in range(99) %}"
TIME, MEMORY, REFUSED = "takes more than 0.2 s", "takes more than 64 MiB", "refuses the turns user, assistant: "
HOSTILE = {
    "loops without output": ("{% set r = range(100000) %}" + LOOPS, TIME),
    "a power": ("{{ 7**(10**7) % 7 }}", TIME),
    "a comparison": (
        GROW + "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}", TIME,
    ),
    "a product": ("{{ 'a' * 10**10 }}", MEMORY),
    "an output that grows": ("{% for a in range(100000) %}{{ 'a' * 100000 }}{% endfor %}", MEMORY),
    "strings that grow": (GROW + "{% set n.x = n.x ~ n.x %}{% endfor %}", MEMORY),
    "lists of lists": (GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}", f"{MEMORY}|{TIME}"),
    "a macro without an end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", REFUSED + "maximum recursion"),
    "a deep expression": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", REFUSED),
    "a constant without an end": (TURNS + "{# '" + "\\'" * 40_000 + " #}", TIME),
    "a range": ("{% for a in range(10**9) %}{% endfor %}", REFUSED + "Range too big"),
}  # fmt: skip


def encoder(chat_template: str) -> Encoder:
    tokenizer = four_tokenizers.fresh("byte_level")
    tokenizer.chat_template, tokenizer.name_or_path = chat_template, "someone/model"
    return Encoder(tokenizer=tokenizer, template="chat", max_tokens=300)


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limited, "SECONDS", 0.2)
    monkeypatch.setattr(limited, "MEBIBYTES", 64)
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_without_measure_is_ended_with_one_line(what: str, low_limits: None, monkeypatch) -> None:
    template, said = HOSTILE[what]
    kind = UsageError if said.startswith(REFUSED) else Refused
    if TIME not in said:
        monkeypatch.setattr(limited, "SECONDS", 20.0)  # a busy machine takes long to get to what ends it

    with pytest.raises(kind, match=rf"^someone/model: .*({said}).* Next: --template none") as caught:
        encoder(template)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_hostile_to_one_row_alone_is_ended_at_it(low_limits: None, monkeypatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 20.0)
    question = [("user", "a", False), ("assistant", "b", True)]
    short, long = (document_of(question * n, source="d", line=n) for n in (1, 2))
    own = encoder(TURNS + "{% if messages|length > 2 %}{{ 'a' * 10**10 }}{% endif %}")

    with pytest.raises(Refused, match=MEMORY):
        own.encode_batch([short, long, short])
    assert own.encode(short).status == "ok"


def test_a_child_holds_no_file_of_its_parent(tmp_path: Path) -> None:
    with hold_lock(tmp_path):
        own = Limited(str.upper)
        assert own.map(["a"]) == [("A", "")]
    with hold_lock(tmp_path):
        assert own.map(["a", "b"]) == [("A", ""), ("B", "")]


def test_a_child_finalises_nothing_of_its_parent(tmp_path: Path) -> None:
    gc.disable()
    circle: list[Any] = [type("Owner", (), {"__del__": lambda _self: (tmp_path / "gone").touch()})()]
    circle.append(circle)
    del circle
    try:
        assert Limited(gc.collect).map([[]])[0][1] == ""
        assert not (tmp_path / "gone").exists()
    finally:
        gc.enable()


def test_a_copy_of_the_process_has_a_child_of_its_own_and_leaves_that_of_its_parent() -> None:
    own = [Limited(os.getpid)]
    child = own[0].map([[]])

    def use() -> None:
        assert own[0].map([[]]) != child
        own.clear()

    assert exit_code_of(use) == 0
    assert own[0].map([[]]) == child


def test_an_interrupted_call_gives_no_answer_to_the_next_one() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    own = Limited(lambda seconds: time.sleep(seconds) or seconds)
    own.map([[0]])
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            own.map([[0.3]])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert own.map([[0]]) == [(0, "")]
