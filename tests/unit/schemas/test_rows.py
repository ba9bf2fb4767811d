import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_schemas.corpus.conversation import conversation
from xkd_schemas.corpus.files import LongLine
from xkd_schemas.corpus.formats import FORMS, choose_form
from xkd_schemas.corpus.rows import RawRow, RejectedRow, read_documents
from xkd_schemas.documents import Document


def read(form: str, *contents: object, **unused: dict[str, int]) -> tuple[list[Document], list[RejectedRow]]:
    lines = [c if isinstance(c, bytes | LongLine) else json.dumps(c).encode() for c in contents]
    rows = [RawRow(line=n, content=line) for n, line in enumerate(lines, 1)]
    return read_documents("a.jsonl", form, {}, rows, max_chars=1000, **unused)


def parts(document: Document) -> list[str]:
    """Role and text of each segment; the role of a target has a star."""
    return [f"{s.role}{'*' * s.target} {document.text[s.start : s.end]}" for s in document.segments]


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
    {"role": "assistant", "content": "C", "tool_calls": None},
    {"role": "tool", "content": "D"},
]


@pytest.mark.parametrize(
    ("form", "row", "wanted"),
    [
        ("prompt_response", {"prompt": "Hi?", "response": "Yes"}, ["prompt Hi?", "response* Yes"]),
        ("alpaca", {"instruction": "Add", "input": "1", "output": "3"}, ["instruction Add", "input 1", "response* 3"]),
        ("alpaca", {"instruction": "Go.", "input": None, "output": "No."}, ["instruction Go.", "response* No."]),
        ("alpaca", {"instruction": "Go.", "output": "No."}, ["instruction Go.", "response* No."]),
        ("text", {"text": " kept as it is \n"}, ["text*  kept as it is \n"]),
        ("text", b'{"text": "a\\u0000b\\u2028c\\u0085"}', ["text* a\0b\u2028c\x85"]),
        ("messages", {"messages": TURNS}, ["system Be kind.", "user AB", "assistant* C", "tool D"]),
    ],
)
def test_each_form_becomes_its_segments(form: str, row: object, wanted: list) -> None:
    (document,), rejected = read(form, row)

    assert rejected == []
    assert parts(document) == wanted
    assert (document.source, document.line) == ("a.jsonl", 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "bad_json"), (b'{"text": NaN}', "bad_json"), (b'{"text": "a\x00"}', "bad_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "bad_json"), (b"\xef\xbb\xbf{}", "bad_json"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json"),
        (b'{"text": "\xff"}', "bad_utf8"), (b'{"text": "\xed\xa0\x80"}', "bad_utf8"),
        (b'{"text": "\\ud800"}', "lone_surrogate"), (b'{"text": "\\ud800" oops}', "bad_json"),
        (b'{"text": "\\udc00\\ud800 \\uD83D\\uDE00"}', "lone_surrogate"),
        (b"", "blank"), (b"  \t", "blank"), (b"[1, 2]", "bad_type"), ({}, "missing_field"),
        ({"text": None}, "missing_field"), ({"text": 3}, "bad_type"), ({"text": ""}, "empty"),
        ({"text": " \n\t"}, "empty"), ({"text": "x" * 1001}, "too_long"),
        (LongLine(num_bytes=70_000_000, sha256="ab", head=b"x" * 256), "line_too_long"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_rejected_for_its_reason(content: object, reason: str) -> None:
    documents, rejected = read("text", content)

    assert (documents, [r.reason for r in rejected]) == ([], [reason])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "bad_type"), (["hello"], "bad_type"), ([], "empty"), ([{"role": "user"}], "missing_field"),
        ([{"content": "x"}], "missing_field"), ([{"role": "robot", "content": "x"}], "bad_role"),
        ([{"role": 3, "content": "x"}], "bad_type"), ([{"role": "user", "content": ["x"]}], "bad_type"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}], "bad_type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "bad_type"),
        ([{"role": "user", "content": "x"}], "no_target"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "no_target"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_used_is_rejected_for_its_reason(messages: object, reason: str) -> None:
    documents, rejected = read("messages", {"messages": messages})

    assert (documents, [r.reason for r in rejected]) == ([], [reason])


def test_a_table_row_is_read_from_its_mapped_column_and_half_a_surrogate_pair_in_it_is_rejected() -> None:
    rows = [RawRow(line=7, content={"question": text, "response": "So."}) for text in ("Why?", "\ud800")]

    (document,), (rejected,) = read_documents("a", "prompt_response", {"prompt": "question"}, rows)

    assert (document.text, rejected.reason) == ("Why?So.", "lone_surrogate")


def test_a_reject_shows_what_is_wrong_in_printable_ascii() -> None:
    content = '{"text": "\u202e\x1b[2J</script>", "n": '.encode() + b"\xff" * 300

    _, (rejected,) = read("text", content)

    assert len(rejected.detail) <= 200
    assert all(" " <= c <= "~" for c in rejected.detail)
    assert rejected.detail.startswith("byte ")
    assert "\\u202e" in rejected.detail


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=6) | st.sampled_from(["user", "assistant", "text"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), v),
    max_leaves=6,
)
FIELDS = sorted({field.name for form in FORMS.values() for field in form.fields})
ROWS = (
    st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(FIELDS), VALUES)
    | st.dictionaries(st.sampled_from(FIELDS), VALUES).map(lambda row: json.dumps(row).encode())
)


@settings(max_examples=90, deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), contents=st.lists(ROWS, max_size=8), cut=st.integers(0, 8))
def test_every_row_is_a_document_or_a_reject_however_the_rows_are_cut(form: str, contents: list, cut: int) -> None:
    rows = [RawRow(line=n, content=c) for n, c in enumerate(contents, 1)]

    documents, rejected = read_documents("a", form, {}, rows, max_chars=12)

    assert sorted([d.line for d in documents] + [r.line for r in rejected]) == [row.line for row in rows]
    assert all("".join(d.text[s.start : s.end] for s in d.segments) == d.text for d in documents)
    halves = [read_documents("a", form, {}, half, max_chars=12) for half in (rows[:cut], rows[cut:])]
    assert (documents, rejected) == (halves[0][0] + halves[1][0], halves[0][1] + halves[1][1])


def test_keys_that_are_not_used_are_counted_and_those_that_hold_content_are_refused() -> None:
    said = {"role": "assistant", "content": "b", "id": 7, "refusal": None, "weight": 1}
    good = {"messages": [{"role": "user", "content": "a", "stamp": 1}, said], "source": "x", "empty": None}
    bad = {"messages": [{"role": "user", "content": "a", "images": ["x.png"]}, said]}
    unused: dict[str, int] = {}

    documents, rejected = read("messages", good, bad, unused=unused)

    assert (len(documents), documents[0].messages, [r.reason for r in rejected]) == (1, "", ["bad_type"])
    assert '"messages"[0] has "images", which is not read in a message of user' in rejected[0].detail
    assert unused == {"row.source": 1, "message.id": 1, "message.stamp": 1}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "assistant", "content": "b", "weight": 0.5}, "is 0.5, not 0, 1, true or false"),
        ({"role": "user", "content": "b", "reasoning_content": "c"}, "which is not read in a message of user"),
        ({"role": "assistant", "content": "b", "reasoning": "c", "thinking": "d"}, "different reasoning and thinking"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "has no name and arguments"),
        ({"role": "assistant", "content": None}, "is null, not a string"),
    ],
)
def test_what_a_message_says_that_cannot_be_read_is_refused(message: dict[str, object], why: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, message]}

    _, rejected = read("messages", row)

    assert [why in r.detail for r in rejected] == [True]


def test_the_segments_of_a_turn_with_reasoning_and_calls_are_targets_of_their_own_role() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "thinking": "c", "tool_calls": [call], "weight": 1},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "d", "train": False},
    ]
    row = {"messages": turns, "tools": json.dumps([{"name": "add"}])}

    (document,), _ = read("messages", row)

    made = '{"name": "add", "arguments": {"x": 1}}'
    assert parts(document) == ["user a", "reasoning* c", "assistant* b", f"tool_call* {made}", "tool 2", "assistant d"]
    filled = conversation(document, document.text)
    assert filled.tools == [{"name": "add"}]
    assert filled.messages == [{k: v for k, v in t.items() if k not in ("weight", "train")} for t in turns]


def test_sharegpt_and_mistral_rows_are_the_messages_that_openai_would_write() -> None:
    calls = [{"function": {"name": "add", "arguments": {"x": 1}}}]
    wanted = {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"name": "add"}],
    }  # fmt: skip
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"},
        ],
        "system": "s", "tools": json.dumps(wanted["tools"]), "id": "x",
    }  # fmt: skip
    mistral = {"interactions": wanted["messages"][1:], "system_prompt": "s", "tools": wanted["tools"]}
    (document,), _ = read("messages", wanted)

    for row, unused in ((sharegpt, {"row.id": 1}), (mistral, {})):
        form, columns, _ = choose_form("a", "auto", {}, [row])
        counts: dict[str, int] = {}
        raw = RawRow(line=1, content=json.dumps(row).encode())
        assert read_documents("a.jsonl", form, columns, [raw], unused=counts) == ([document], [])
        assert counts == unused


def test_a_system_turn_twice_is_refused_and_so_is_a_call_that_is_no_json() -> None:
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    called = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(1)"}]

    _, rejected = read("messages", {"messages": turns, "system": "t"}, {"messages": called})

    assert ["stands beside a system turn" in rejected[0].detail, "is no JSON" in rejected[1].detail] == [True, True]


def test_of_several_references_the_first_is_learnt_and_the_others_are_counted() -> None:
    unused: dict[str, int] = {}
    rows = [{"instruction": "Go.", "input": "", "output": ["No.", "Never."]}, {"instruction": "Go.", "output": [3]}]

    (document,), rejected = read(choose_form("a", "auto", {}, rows)[0], *rows, unused=unused)

    assert parts(document)[-1] == "response* No."
    assert unused == {"row.output[1:]": 1}
    assert [r.reason for r in rejected] == ["bad_type"]
