"""Layouts put glue round segments, never into them; a chat template writes the row."""

import numpy as np
import pytest

import four_tokenizers
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.text.encode import REASONS, Encoder
from xkd_schemas.text.rendering import ChatTemplate, Rendered
from xkd_schemas.text.templates import LAYOUTS
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Tokens


def document(*roles_and_texts: tuple[str, str]) -> Document:
    targets = {"assistant", "response", "text"}
    return document_of([(role, text, role in targets) for role, text in roles_and_texts], source="d.jsonl", line=7)


def encoder(
    chat_template: str = four_tokenizers.CHAT_TEMPLATE, *, kind: str = "byte_level", template: str = "chat"
) -> Encoder:
    tokenizer = four_tokenizers.fresh(kind)
    tokenizer.chat_template = chat_template
    return Encoder(tokenizer=tokenizer, template=template, max_tokens=300)


def chat(doc: Document, chat_template: str = four_tokenizers.CHAT_TEMPLATE) -> str:
    found = ChatTemplate(encoder(chat_template).tokenizer).render([doc])[0]
    assert isinstance(found, Rendered)
    return found.text


def decoded(tokens: Tokens, *kinds: int) -> str:
    tokenizer = four_tokenizers.chat_tokenizer()
    return str(tokenizer.decode(tokens.ids[np.isin(tokens.kinds, kinds)].tolist()))


ASKED = "Below is an instruction that describes a task"
MORE = ", paired with an input that provides further context"
WRITE = ". Write a response that appropriately completes the request.\n\n### Instruction:\nName it."


@pytest.mark.parametrize(
    ("template", "turns", "text"),
    [
        ("none", [("prompt", "Who lit it?"), ("response", "Nobody.")], "Who lit it?Nobody."),
        (
            "alpaca",
            [("instruction", "Name it."), ("response", "A lamp.")],
            f"{ASKED}{WRITE}\n\n### Response:\nA lamp.",
        ),
        (
            "alpaca",
            [("instruction", "Name it."), ("input", "a light"), ("response", "A lamp.")],
            f"{ASKED}{MORE}{WRITE}\n\n### Input:\na light\n\n### Response:\nA lamp.",
        ),
        ("alpaca", [("instruction", "Name it.")], f"{ASKED}{WRITE}\n\n### Response:\n"),
        ("alpaca", [("prompt", "Name it."), ("response", "A lamp.")], f"{ASKED}{WRITE}\n\n### Response:\nA lamp."),
    ],
)
def test_none_is_nothing_but_the_segments_and_alpaca_is_the_published_prompt(
    template: str, turns: list[tuple[str, str]], text: str
) -> None:
    doc = document(*turns)
    said = [doc.text[segment.start : segment.end] for segment in doc.segments]

    assert "".join(p if isinstance(p, str) else said[p] for p in LAYOUTS[template](doc)) == text


def test_instruction_and_input_are_one_user_message() -> None:
    doc = document(("instruction", "Name it."), ("input", "a light"), ("response", "A lamp."))

    assert chat(doc) == ("<|im_start|>user\nName it.\n\na light<|im_end|>\n<|im_start|>assistant\nA lamp.<|im_end|>\n")


def test_the_templates_own_end_token_ends_a_target_and_what_follows_the_last_is_left_out() -> None:
    doc = document(("user", "Who?"), ("assistant", "The keeper."), ("user", "Why?"), ("assistant", "Duty."))

    tokens = encoder().encode(doc)

    assert tokens.status == OK
    assert decoded(tokens, CONTENT) == doc.text
    assert decoded(tokens, END) == "<|im_end|><|im_end|>"
    assert decoded(tokens, TEMPLATE) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens.kinds[-1] == END
    assert tokens.spans[tokens.kinds == END].tolist() == [[15, 15], [24, 24]]


def test_a_start_token_ends_no_turn_and_eos_stands_behind_the_last_target() -> None:
    own = encoder("{% for m in messages %}{{ '<s>' + m['content'] }}{% endfor %}")
    doc = document(("user", "Who?"), ("assistant", "Him."), ("user", "Why?"), ("assistant", "x"))

    tokens = own.encode(doc)

    assert tokens.ids[tokens.kinds == END].tolist() == [own.tokenizer.eos_token_id]
    assert own.tokenizer.decode(tokens.ids.tolist()) == "<s>Who?<s>Him.<s>Why?<s>x</s>"


def test_only_templates_without_one_of_their_own_get_the_start_token_that_the_tokenizer_adds() -> None:
    turns = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    doc = document(("prompt", "Who?"), ("response", "Him."))

    for name, starts in (("none", True), ("alpaca", True), ("chat", False)):
        tokens = encoder(turns, kind="sentencepiece", template=name).encode(doc)
        assert (tokens.ids[0] == 1) == starts, name


def test_the_same_text_has_the_same_intervals_under_every_template() -> None:
    doc = document(("prompt", "Who lit the lamp?"), ("response", "Nobody knew."))
    rows = [encoder(template=name).encode(doc) for name in ("none", "alpaca", "chat")]

    assert len({str(row.spans[row.kinds != TEMPLATE].tolist()) for row in rows}) == 1
    assert len({str(row.spans[row.targets].tolist()) for row in rows}) == 1


def test_todays_date_in_a_template_is_not_todays() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"

    assert chat(document(("user", "a"), ("assistant", "b")), template) == "2025-01-01 ab"


@pytest.mark.parametrize(
    ("chat_template", "status"),
    [
        ("{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}", "template_reorders"),
        ("{% for m in messages %}{{ m['content']|upper }}{% endfor %}", "template_changes_text"),
        ("{{ raise_exception('Too many turns') }}", "template_refuses"),
        ("{% for m in messages[:2] %}{{ m['content'] + '!' }}{% endfor %}", OK),
    ],
)
def test_what_cannot_be_mapped_has_a_reason_of_its_own(chat_template: str, status: str) -> None:
    short = "{% if messages|length == 2 %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% else %}"
    own = encoder(f"{short}{chat_template}{{% endif %}}")
    turns = document(("user", "a b"), ("assistant", "c d"), ("user", "e f"), ("assistant", "g h"))

    tokens = own.encode(turns)

    assert tokens.status == status
    assert status == OK or (status in REASONS and not len(tokens.ids))
    if status != OK:
        with pytest.raises(UsageError, match=r"d\.jsonl:7: .*the chat template .*Next: fix the turns, or --template"):
            own.check([turns])
        own.check([turns, document(("user", "a"), ("assistant", "b"))])


@pytest.mark.parametrize(
    ("chat_template", "why"),
    [
        ("{{ raise_exception('System role not supported') }}", "refuses the turns user, assistant: System role not"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves the text out"),
        ("{% for m in messages %}{{ m['content']|upper }}{% endfor %}", "its characters are not found again"),
    ],
)
def test_a_template_that_takes_no_question_is_refused_with_its_tokenizer(chat_template: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"{why}.*Next: --template none or --template alpaca"):
        encoder(chat_template)


def test_a_tokenizer_without_a_chat_template_is_told_what_to_type() -> None:
    with pytest.raises(UsageError, match=r"has no chat template\. Next: --template none or --template alpaca"):
        encoder("")


@pytest.mark.parametrize("name", ["chat", "alpaca"])
def test_plain_text_is_refused_by_templates_with_turns(name: str) -> None:
    with pytest.raises(UsageError, match=rf"d\.jsonl:7: plain text has no turns, the {name} .*Next: --template none"):
        encoder(template=name).encode(document(("text", "a")))


def test_alpaca_refuses_a_conversation() -> None:
    with pytest.raises(UsageError, match=r"found user, assistant\. Next: --template chat"):
        LAYOUTS["alpaca"](document(("user", "a"), ("assistant", "b")))
