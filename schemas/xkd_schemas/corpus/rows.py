"""Rows of a corpus to documents, or to the reason why a row is rejected.

Pure: no file is opened here, so the same rows give the same documents in any process. Every row
becomes exactly one document or one RejectedRow.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import orjson

from xkd_schemas.corpus.conversation import CALL, REASONING, REASONING_KEYS, call_text
from xkd_schemas.corpus.files import LongLine
from xkd_schemas.corpus.formats import FORMS, MOST_POLICY, PROMPTS, RowFormat
from xkd_schemas.documents import POLICY, Document, document_of

MAX_CHARS: Final = 1_000_000  # characters of the longest document that is taken
DETAIL_CHARS: Final = 200  # characters of a rejected row that are kept

Reason = Literal[
    "bad_json", "bad_type", "missing_field", "lone_surrogate", "bad_utf8", "blank", "empty", "no_target", "bad_role",
    "too_long", "line_too_long",
]  # fmt: skip

CHAT_ROLES: Final = {"system": False, "developer": False, "user": False, "assistant": True, "tool": False}
"""Roles of a chat message, and whether the student learns to produce them."""
OTHER_ROLES: Final = {
    "human": "user", "gpt": "assistant", "model": "assistant", "function": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""What other files call these roles."""
FUNCTION_CALL: Final = "function_call"  # a role of ShareGPT files: its content is the JSON of an assistant's calls
OTHER_KEYS: Final = {"from": "role", "value": "content"}  # what ShareGPT files call the keys of a message
OTHER_CONTENT: Final = (FUNCTION_CALL, "images", "audio", "refusal", "prefix")  # keys of content that is not read
PASSED_KEYS: Final = ("name", "tool_call_id")  # keys of a message that are handed to the chat template as they are
TRAINED_KEYS: Final = ("weight", "train")  # keys of a message that turn its target off with 0 or false
TOOLS: Final = "tools"  # key of a chat row with the tools that may be called
SYSTEM_KEYS: Final = ("system", "system_prompt")  # keys of a chat row with a system turn that is none of its messages
ROW_KEYS: Final = (TOOLS, *SYSTEM_KEYS)  # columns of a chat row that are read beside its messages

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

Part = tuple[str, str, bool]  # (role, text, is target)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row of a source, not yet looked at."""

    line: int  # row in the source, first is 1; of a JSONL file the line, of a folder counted through its files
    content: bytes | LongLine | dict[str, object]
    """One JSONL line without its end, a line too long to hold, or a row of a table. Of a table row
    with text that is not UTF-8: the bytes of that text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedRow:
    """One row that became no document, and why."""

    source: str
    line: int
    reason: str  # a code: a `Reason`, or tokens.WORKER_KILLED
    detail: str  # what is wrong and how the row begins: at most 200 characters of printable ASCII
    sha256: str  # of the row's bytes; of a table row, of its JSON with sorted keys


class RowRejected(ValueError):
    """Why one row becomes no document."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.reason = reason


def read_documents(
    source: str,
    form: str,
    columns: Mapping[str, str],
    rows: Sequence[RawRow],
    *,
    max_chars: int = MAX_CHARS,
    unused: dict[str, int] | None = None,
) -> tuple[list[Document], list[RejectedRow]]:
    """Documents and rejected rows, both in the order of `rows`; together as many as there are rows.

    Args:
        source: The name that documents and rejects carry.
        form: A key of FORMS.
        columns: Field to column; a field that is not there is read from the column of its own name.
        rows: Any stretch of the source; results do not depend on how it is cut.
        max_chars: Characters above which a document is rejected as too_long.
        unused: Counts keys of chat rows and their messages that are not used, and references behind a first one.
    """
    kind = FORMS[form]
    names = {field.name: columns.get(field.name, field.name) for field in kind.fields}
    documents: list[Document] = []
    rejected: list[RejectedRow] = []
    for row in rows:
        try:
            counts = {} if unused is None else unused
            content = _object_of(row.content)
            policy = _take_policy(content, columns)
            parts, messages = _parts_of(kind, names, content, counts)
            document = _document(parts, messages, source=source, line=row.line, max_chars=max_chars)
            documents.append(replace(document, policy=policy) if policy else document)
        except RowRejected as why:
            rejected.append(rejected_row(source, row, why.reason, str(why)))
    return documents, rejected


def parsed_row(content: bytes | LongLine | dict[str, object]) -> dict[str, object] | None:
    """The row as an object, or None where it is none: for looking at the first rows of a source."""
    try:
        return _object_of(content)
    except RowRejected:
        return None


def _object_of(content: bytes | LongLine | dict[str, object]) -> dict[str, object]:
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items()}
    if isinstance(content, LongLine):
        raise RowRejected("line_too_long", f"a line of {content.num_bytes} bytes")
    if not content.strip():
        raise RowRejected("blank", "a blank line between rows")
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise _json_error(content, error) from None
    if not isinstance(value, dict):
        raise RowRejected("bad_type", f"the row is {_kind(value)}, not an object")
    return value


def _without_nulls(value: object) -> object:
    """A table's value without the keys that its other rows have and it has not."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_error(content: bytes, error: orjson.JSONDecodeError) -> RowRejected:
    """Tell broken UTF-8 and half surrogate pairs from other broken JSON."""
    try:
        content.decode()
    except UnicodeDecodeError as not_text:
        return RowRejected("bad_utf8", f"byte {not_text.start} is not UTF-8")
    try:
        orjson.loads(_SURROGATE.sub(rb"\\ufffd", content))
    except orjson.JSONDecodeError:
        return RowRejected("bad_json", str(error))
    return RowRejected("lone_surrogate", str(error))


def _take_policy(row: dict[str, object], columns: Mapping[str, str]) -> str:
    """Who wrote the response; that field is removed from the row."""
    value = row.pop(columns[POLICY], None) if POLICY in columns else None
    if value is not None and not (isinstance(value, str) and len(value) <= MOST_POLICY):
        raise RowRejected("bad_type", f'field "{columns[POLICY]}" is no text of at most {MOST_POLICY} characters')
    return value or ""


MESSAGES: Final = "messages"
STAND_IN: Final = "A"  # in the place of the response that is asked for


def read_prompt(source: str, form: str, columns: Mapping[str, str], row: RawRow) -> tuple[dict[str, Any], Document]:
    """What a row asks, and a document of it with STAND_IN as its only target; RowRejected where it asks nothing.

    Of chat messages, those of the assistant at the end are left out.
    """
    content = _object_of(row.content)
    names = {field.name: columns.get(field.name, field.name) for field in PROMPTS[form].fields}
    asked = {name: content[column] for name, column in names.items() if content.get(column) is not None}
    shown = asked
    if isinstance(messages := asked.get(MESSAGES), list):
        said = [isinstance(m, dict) and CHAT_ROLES.get(str(_rename_keys(m, "").get("role")), False) for m in messages]
        end = len(said) - said[::-1].index(False) if False in said else 0
        asked |= {key: content[key] for key in ROW_KEYS if content.get(key) is not None} | {MESSAGES: messages[:end]}
        turns = [m | {"weight": 0} if own else m for m, own in zip(messages[:end], said, strict=False)]
        shown = asked | {MESSAGES: turns}
    parts, more = _parts_of(
        FORMS[form], {f.name: f.name for f in FORMS[form].fields}, with_answer(form, shown, STAND_IN), {}
    )
    if not any(text.strip() for _, text, _ in parts[:-1]):
        raise RowRejected("empty", "no prompt")
    return asked, _document(parts, more, source=source, line=row.line, max_chars=MAX_CHARS)


def with_answer(form: str, asked: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A row of the form: what it asks, and the answer.

    >>> with_answer("prompt_response", {"prompt": "Hi?"}, "Yes.")
    {'prompt': 'Hi?', 'response': 'Yes.'}
    """
    if form == MESSAGES and isinstance(asked.get(MESSAGES), list):
        return {**asked, MESSAGES: [*asked[MESSAGES], {"role": "assistant", "content": text}]}
    return {**asked, **{field.name: text for field in FORMS[form].fields if field.target}}


def references_of(form: str, columns: Mapping[str, str], row: Mapping[str, object]) -> list[str]:
    """All the responses of a row that has a list of them; else empty.

    >>> references_of("alpaca", {"output": "output"}, {"output": ["Hi.", "Hello."]})
    ['Hi.', 'Hello.']
    """
    for field in FORMS[form].fields:
        value = row.get(columns.get(field.name, field.name)) if field.role == "response" else None
        if isinstance(value, list):
            return value if all(isinstance(text, str) for text in value) else []
    return []


def _parts_of(
    form: RowFormat, columns: Mapping[str, str], row: Mapping[str, object], unused: dict[str, int]
) -> tuple[list[Part], str]:
    """The row's parts, and as `Document.messages` what they do not say."""
    parts: list[Part] = []
    messages = ""
    for field in form.fields:
        column = columns[field.name]
        value = row.get(column)
        if field.role == "response" and isinstance(value, list) and value:  # of several the first is learnt
            _count(unused, "row", [f"{column}[1:]"] * (len(value) - 1))
            value = value[0]
        if value is None:
            if field.required:
                raise RowRejected("missing_field", f'field "{column}" is {"null" if column in row else "missing"}')
        elif field.role:
            parts.append((field.role, _text(value, f'field "{column}"'), field.target))
        else:
            parts, messages = _chat(value, column, row, unused)
    return parts, messages


def _chat(value: object, column: str, row: Mapping[str, object], unused: dict[str, int]) -> tuple[list[Part], str]:
    if not isinstance(value, list):
        raise RowRejected("bad_type", f'field "{column}" is {_kind(value)}, not a list')
    _count(unused, "row", [key for key in row if row[key] is not None and key not in (column, *ROW_KEYS)])
    parts: list[Part] = []
    value = [*_system_turn(row, value), *value]
    messages = [_message(message, f'"{column}"[{at}]', parts, unused) for at, message in enumerate(value)]
    tools = _list(_json(row.get(TOOLS), f'"{TOOLS}"') or [], f'"{TOOLS}"')
    plain = all(list(m) == ["role", "content"] and m["content"] != "" for m in messages)
    if plain and not tools:
        return parts, ""
    return parts, json.dumps({"messages": messages} | ({"tools": tools} if tools else {}), ensure_ascii=False)


def _system_turn(row: Mapping[str, object], messages: Sequence[object]) -> list[object]:
    found = [key for key in SYSTEM_KEYS if row.get(key)]
    if found and any(isinstance(m, dict) and "system" in (m.get("role"), m.get("from")) for m in messages):
        raise RowRejected("bad_type", f'"{found[0]}" stands beside a system turn in the messages')
    return [{"role": "system", "content": row[key]} for key in found[:1]]


def _rename_keys(message: Mapping[str, object], where: str) -> dict[str, object]:
    """A message with the keys and roles of OpenAI's files, whatever its own file calls them."""
    found = {OTHER_KEYS[k] if OTHER_KEYS.get(k, k) not in message else k: value for k, value in message.items()}
    role = found.get("role")
    if isinstance(role, str):
        found["role"] = OTHER_ROLES.get(role, role)
    if role == FUNCTION_CALL:
        calls = _json(found.pop("content", None), where)
        found |= {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return found


def _json(value: object, what: str) -> object:
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise RowRejected("bad_type", f"{what} is no JSON: {error}") from None


def _message(message: object, where: str, parts: list[Part], unused: dict[str, int]) -> dict[str, object]:
    """A message in which a number stands for each text, which is put behind `parts`."""
    if not isinstance(message, dict):
        raise RowRejected("bad_type", f"{where} is {_kind(message)}, not an object")
    message = _rename_keys(message, where)
    said = {key: value for key, value in message.items() if value is not None}
    calls = said.pop("tool_calls", None) or []
    if "role" not in said or ("content" not in message and not calls and said.keys().isdisjoint(REASONING_KEYS)):
        raise RowRejected("missing_field", f'{where} has no "{"content" if "role" in said else "role"}"')
    role = _text(said.pop("role"), f"the role of {where}")
    if role not in CHAT_ROLES:
        raise RowRejected("bad_role", f'{where} has the role "{role[:40]}"')
    target = CHAT_ROLES[role] and _is_trained(said, where)
    reasoning = {key: said.pop(key) for key in REASONING_KEYS if key in said}
    only_assistant = [key for key, value in (*reasoning.items(), ("tool_calls", calls)) if value]
    for key in [k for k in OTHER_CONTENT if said.get(k)] + (only_assistant if role != "assistant" else []):
        raise RowRejected("bad_type", f'{where} has "{key}", which is not read in a message of {role}')
    if len(set(map(str, reasoning.values()))) > 1:
        raise RowRejected("bad_type", f"{where} has different {' and '.join(reasoning)}")
    found: dict[str, object] = {"role": role}
    texts: list[tuple[str, str, str]] = [
        (key, REASONING, _text(value, f'"{key}" of {where}')) for key, value in list(reasoning.items())[:1]
    ]
    if "content" not in said and "content" in message and not calls and not reasoning:
        raise RowRejected("bad_type", f"the content of {where} is null, not a string")
    if "content" in said:
        texts.append(("content", role, _content(said.pop("content"), where)))
    for key, name, text in texts:
        found[key] = len(parts) if text else ""
        parts += [(name, text, target)] if text else []
    if calls:
        found["tool_calls"] = [_call(call, where, parts, target=target) for call in _list(calls, where)]
    found |= {key: _text(said.pop(key), f'"{key}" of {where}') for key in PASSED_KEYS if key in said}
    _count(unused, "message", [key for key in said if key not in TRAINED_KEYS and key not in OTHER_CONTENT])
    return found


def _call(call: dict[str, object], where: str, parts: list[Part], *, target: bool) -> list[object]:
    try:
        text, rest = call_text(call)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RowRejected("bad_type", f"a call in {where} has no name and arguments: {error}") from None
    parts.append((CALL, _text(text, f"a call in {where}"), target))
    return [len(parts) - 1, rest]


def _is_trained(said: dict[str, object], where: str) -> bool:
    for key in TRAINED_KEYS:
        if key in said and said[key] not in (0, 1):
            raise RowRejected("bad_type", f'"{key}" of {where} is {str(said[key])[:40]}, not 0, 1, true or false')
    return all(said.get(key, 1) for key in TRAINED_KEYS)


def _list(value: object, what: str) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowRejected("bad_type", f"{what} is {_kind(value)}, not a list of objects")
    return value


def _count(unused: dict[str, int], what: str, keys: Sequence[str]) -> None:
    for key in keys:
        name = f"{what}.{key[:40]}"
        unused[name] = unused.get(name, 0) + 1


def _content(value: object, where: str) -> str:
    if not isinstance(value, list):
        return _text(value, f"the content of {where}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text":
            raise RowRejected("bad_type", f"the content of {where} has a part of type {str(kind)[:40]}")
        texts.append(_text(part.get("text"), f"a text part of {where}"))
    return "".join(texts)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowRejected("bad_type", f"{what} is {_kind(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowRejected("lone_surrogate", f"{what} has half a surrogate pair at character {error.start}") from None
    return value


def _kind(value: object) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    kinds |= {list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _document(parts: Sequence[Part], messages: str, *, source: str, line: int, max_chars: int) -> Document:
    num_chars = sum(len(text) for _, text, _ in parts)
    if num_chars > max_chars:
        raise RowRejected("too_long", f"{num_chars} characters, the limit is {max_chars}")
    if not any(text.strip() for _, text, _ in parts):
        raise RowRejected("empty", "no text")
    if not any(target and text.strip() for _, text, target in parts):
        raise RowRejected("no_target", "nothing to learn: no text in a response")
    return document_of(parts, source=source, line=line, messages=messages)


def rejected_row(source: str, row: RawRow, reason: str, what: str) -> RejectedRow:
    """The entry of a row that becomes no document; `what` says in words what is wrong with it."""
    content = row.content
    if isinstance(content, LongLine):
        head, sha256 = content.head, content.sha256
    else:
        bytes_ = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, default=str).encode()
        head, sha256 = bytes_[:DETAIL_CHARS], hashlib.sha256(bytes_).hexdigest()
    start = head[:DETAIL_CHARS].decode("utf-8", "backslashreplace")
    said = f"{what}: {start}" if start else what
    detail = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in said)[:DETAIL_CHARS]
    return RejectedRow(source=source, line=row.line, reason=reason, detail=detail, sha256=sha256)
