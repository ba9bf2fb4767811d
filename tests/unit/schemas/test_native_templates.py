"""What a model is fed under --template chat is what its tokenizer makes of the row's own messages."""

import copy
import functools
import json
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import four_tokenizers
from chat_templates import TEMPLATES
from xkd_schemas.corpus.rows import RawRow, read_documents
from xkd_schemas.documents import Document
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Tokens

Message = dict[str, Any]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": 'It\'s "fine"', "parameters": {"type": "object"}},
}


def turn(role: str, text: str, **more: Any) -> Message:
    return {"role": role, "content": text, **more}


user, answer, system = (functools.partial(turn, role) for role in ("user", "assistant", "system"))


def calls(arguments: Any) -> list[Message]:
    return [{"type": "function", "id": "call_0001", "function": {"name": "weather", "arguments": arguments}}]


RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call_0001", "content": '{"t": 31}'}
THINK = "<think>\nHmm, the\nkeeper.\n</think>\n\nHim."
ROWS: dict[str, list[Message]] = {
    "plain": [user("Who lit it?"), answer("Nobody knew.")],
    "system": [system("Be short."), user("Who?"), answer("Him."), user("Why?"), answer("Duty, a\nlamp.")],
    "blanks": [system(" Be\n"), user("\n Who  lit it? \n"), answer("  Him.\n\n"), user("Why?\t"), answer("\nDuty. ")],
    "think": [user("Who?"), answer(THINK), user("Why?"), answer("<think>let me see</think>Duty.")],
    "reasoning": [user("a"), answer("Him.", reasoning_content="Hmm."), user("Why?"), answer("x", thinking="\nEh.\n")],
    "tools": [user("How warm?"), answer("", tool_calls=calls({"city": 'Huế "x"', "days": 3})), RESULT, answer("31.")],
    "call": [user("How warm?"), answer("Look:", tool_calls=calls('{"city":"Hue"}')), RESULT, answer("It is 31.")],
    "no system": [system(""), user("Who?"), answer("Him.")],
    "empty": [user("Who?"), answer(""), user("Why?"), answer("user")],
    "developer": [{"role": "developer", "content": "Be kind."}, user("a"), answer("assistant")],
    "quotes": [user("a"), answer('"quoted" \\ back'), user("say </s> <|im_end|> [/INST]"), answer("I say </s>.")],
    "weights": [user("Who?"), answer("Him.", weight=0), user("Why?"), answer("Duty.", train=True)],
    "scripts": [user("🙂 xin chào <b>&amp;</b>"), answer("東京の夜\u00a0ok\u200b e\u0301 ﬁ {{ x }} {% if %}")],
    "first answer": [answer("Hello."), user("a"), answer("b")],
}
MARKS = ["<|end|>", "<|User|>", "<|Assistant|>", "<|eos|>", "<end_of_turn>", "<|eot_id|>", "<|return|>"]
MARKS += ["<|im_end|>", "<|im_start|>"]
KINDS = {"byte_level": TEMPLATES, "sentencepiece": ("llama2", "mistral v1", "mistral v3", "zephyr", "gemma", "chatml")}
CASES = [(kind, name) for kind, names in KINDS.items() for name in names]


def row_of(name: str) -> dict[str, Any]:
    return {"messages": ROWS[name]} | ({"tools": [TOOL]} if name in ("tools", "call") else {})


def document_of_row(row: dict[str, Any]) -> Document:
    documents, rejected = read_documents("r", "messages", {}, [RawRow(line=1, content=json.dumps(row).encode())])
    assert not rejected, rejected
    return documents[0]


@functools.cache
def encoder_of(kind: str, name: str, thinking: bool | None = None) -> Encoder:
    tokenizer = four_tokenizers.fresh(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATES[name]
    return Encoder(tokenizer=tokenizer, template="chat", max_tokens=10_000, enable_thinking=thinking)


def native(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], name: str) -> str | None:
    """What the tokenizer itself makes of the row; None if the template refuses it."""
    messages = row["messages"]
    if name == "smolvlm":
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False))
    except Exception:  # whatever a template raises
        return None


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_row_is_what_the_tokenizer_makes_of_it_or_has_the_templates_reason(kind: str, name: str) -> None:
    encoder = encoder_of(kind, name)
    used = 0
    for title in ROWS:
        row, document = row_of(title), document_of_row(row_of(title))
        text, tokens = native(encoder.tokenizer, row, name), encoder.encode(document)
        if text is None:
            assert tokens.status == "template_refuses", title
            continue
        assert tokens.status == OK, title
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        ours = tokens.ids.tolist()
        if ours != ids[: len(ours)]:  # a template without an end token: the last target gets eos
            assert ours[-1] == encoder.tokenizer.eos_token_id, title
            ours.pop()
        assert ours == ids[: len(ours)], title
        left = encoder.tokenizer.decode(ids[len(ours) :])
        assert len(left) < 30 or row["messages"][-1]["role"] != "assistant", (title, left)
        check_targets(document, tokens, text)
        used += 1
    assert used >= 6


def check_targets(document: Document, tokens: Tokens, text: str) -> None:
    """Targets of the text lie in segments that are targets, and all of these that the template shows are targets."""
    read = {at for (a, b), kind in zip(tokens.spans.tolist(), tokens.kinds, strict=True) if kind == CONTENT
            for at in range(a, b)}  # fmt: skip
    aimed = {at for (a, b), kind, target in zip(tokens.spans.tolist(), tokens.kinds, tokens.targets, strict=True)
             if target and kind == CONTENT for at in range(a, b)}  # fmt: skip
    wanted = {at for s in document.segments if s.target for at in range(s.start, s.end)}
    assert aimed == read & wanted
    for segment in document.segments:
        body = document.text[segment.start : segment.end].strip()
        if segment.role in ("user", "assistant") and "<think>" not in body and f"{body}" in text.strip():
            solid = {at for at in range(segment.start, segment.end) if not document.text[at].isspace()}
            assert solid <= read or "</s>" in body, body
    assert not tokens.targets[0]
    assert (np.diff(tokens.spans[tokens.kinds == CONTENT], axis=0) >= 0).all()


def drawn(encoder: Encoder, row: dict[str, Any]) -> str:
    """The row as text, what the student learns in brackets."""
    tokens = encoder.encode(document_of_row(row))
    said = [encoder.tokenizer.decode([i]) for i in tokens.ids.tolist()]
    marked = [f"[{text}]" if aim else text for text, aim in zip(said, tokens.targets, strict=True)]
    return "".join(marked).replace("][", "")


SHOWN = {
    ("qwen3 training", "reasoning"): "Why?<|im_end|>\n<|im_start|>assistant\n[<think>\nEh.\n</think>\n\nx<|im_end|>]",
    ("qwen3", "think"): "Who?<|im_end|>\n<|im_start|>assistant\n[Him.<|im_end|>]\n<|im_start|>user",
    ("qwen3 thinking", "plain"): "assistant\n<think>\n[\n</think>\n\nNobody knew.<|im_end|>]",
    ("llama3", "blanks"): "assistant<|end_header_id|>\n\n[Duty.<|eot_id|>]",
    ("qwen3", "call"): 'assistant\n[Look:\n<tool_call>\n{"name": "weather", "arguments": {"city":"Hue"}}\n</tool_call>'
    "<|im_end|>]\n<|im_start|>user\n<tool_response>",
    ("qwen3-coder", "tools"): "[<tool_call>\n<function=weather>\n<parameter=city>\nHu",
    ("gpt-oss", "reasoning"): "assistant[<|channel|>analysis<|message|>\nEh.\n<|end|><|start|>assistant"
    "<|channel|>final<|message|>x<|return|>]",
    ("chatml", "weights"): "assistant\nHim.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[",
    ("deepseek-r1", "think"): "<|Assistant|>[Duty.<|eos|>]",
    ("llama2", "plain"): "[/INST] [Nobody knew.] [</s>]",
    ("vicuna", "plain"): "ASSISTANT: [Nobody knew.</s>]",
}


@pytest.mark.parametrize(("name", "title"), SHOWN)
def test_what_a_model_writes_itself_is_the_target(name: str, title: str) -> None:
    assert SHOWN[name, title] in drawn(encoder_of("byte_level", name), row_of(title))


@pytest.mark.parametrize("name", ["llama2", "mistral v1"])
def test_sentencepiece_rows_have_one_end_token_and_no_blank_of_their_own(name: str) -> None:
    encoder = encoder_of("sentencepiece", name)
    tokens = encoder.encode(document_of_row({"messages": ROWS["system"][1:]}))

    assert (tokens.ids == encoder.tokenizer.eos_token_id).sum() == (tokens.kinds == END).sum() == 2


def test_enable_thinking_reaches_the_template_and_is_part_of_the_identity() -> None:
    on, off, unset = (encoder_of("byte_level", "qwen3", value) for value in (True, False, None))

    assert [e.identity()["chat"]["enable_thinking"] for e in (on, off, unset)] == [True, False, None]
    assert drawn(on, row_of("plain")).endswith("assistant\n[<think>\n\n</think>\n\nNobody knew.<|im_end|>]")
    assert drawn(off, row_of("plain")).endswith("assistant\n<think>\n\n</think>\n\n[Nobody knew.<|im_end|>]")


def test_a_cut_row_is_the_beginning_of_the_whole_one() -> None:
    encoder, document = encoder_of("byte_level", "qwen3 training"), document_of_row(row_of("reasoning"))
    whole = encoder.encode(document)

    for limit in range(2, len(whole.ids)):
        shorter = copy.copy(encoder)  # with its template and what is known of it
        object.__setattr__(shorter, "max_tokens", limit)
        cut = shorter.encode(document)
        assert len(cut.ids) <= limit
        assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
        assert not len(cut.ids) or cut.kinds[-1] != TEMPLATE  # no glue behind the cut
        if cut.status == OK:
            again = encoder.encode(document, cut.num_chars)
            assert (again.ids.tolist(), again.num_chars) == (cut.ids.tolist(), cut.num_chars)
