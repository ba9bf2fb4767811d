"""Prompts are cut to a number of tokens, template included, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest

import four_tokenizers as four
from small_cache import IN_PROCESS, run_file, student_tokenizer, write_rows
from xkd_pipeline.parsing.stage import cut_prompts
from xkd_pipeline.reports.sample import read_sample
from xkd_pipeline.stages import Outcome, documents_stage
from xkd_pipeline.tables.shard import document_at
from xkd_schemas.cache.table import Table
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import CONTENT

LONG = "the cat and the dog went down to the river where they met a fish, " * 3


def row(asked: str, more: str = "", said: str = "They swam. " * 9) -> Document:
    parts = [("instruction", asked, False), ("input", more, False), ("response", said, True)]
    return document_of(parts, source="r", line=1)


def prompt_tokens(document: Document, encoder: Encoder) -> int:
    """Tokens in front of the first target, counted one by one."""
    targets = encoder.encode(document).targets.tolist()
    return targets.index(True)


@pytest.mark.parametrize(("kind", "template"), [*zip(four.KINDS, ("none", "alpaca") * 2, strict=True)])
def test_a_long_prompt_keeps_the_first_tokens_and_loses_nothing_of_the_response(kind: str, template: str) -> None:
    encoder = four.encoder_of(kind, 10**6, template)
    documents = [row("Who swam?"), row(LONG), row("Tell it again.", LONG), row(LONG, "Short.")]
    most = prompt_tokens(documents[2], encoder) - 5

    cut = cut_prompts(documents, encoder, most)

    assert cut[0] is documents[0]
    for before, after in zip(documents[1:], cut[1:], strict=True):
        assert after is not None
        whole, kept = encoder.encode(before), encoder.encode(after)
        prompt = [s for s in after.segments if not s.target]
        text = "".join(before.text[s.start : s.end] for s in before.segments if not s.target)
        if prompt_tokens(before, encoder) <= most:
            assert after is before
            continue
        n = after.segments[-1].start
        assert text.startswith(after.text[:n])
        assert n < len(text)
        assert after.text[n:] == before.text[len(text) :]
        assert prompt_tokens(after, encoder) <= most
        if len(prompt) == len(before.segments) - 1:  # no segment is gone, and with it its part of the template
            assert prompt_tokens(after, encoder) >= most - 1
        first = [i for i, k in zip(whole.ids.tolist(), whole.kinds.tolist(), strict=True) if k == CONTENT]
        ours = [
            i for i, k, t in zip(kept.ids.tolist(), kept.kinds.tolist(), kept.targets.tolist(), strict=True)
            if k == CONTENT and not t
        ]  # fmt: skip
        assert ours[:-1] == first[: len(ours) - 1]


def test_without_a_limit_nothing_is_touched_and_what_cannot_be_cut_is_none() -> None:
    document = row(LONG)
    encoder = four.encoder_of(four.KINDS[0], 10**6, "alpaca")
    with_tools = document_of([("user", LONG, False), ("assistant", "Yes", True)], source="r", line=2, messages="{}")

    assert cut_prompts([document], None, 0) == [document]
    assert cut_prompts([document], encoder, 3) == [None]
    plain = four.encoder_of(four.KINDS[0], 10**6)
    assert cut_prompts([with_tools], plain, 8) == [None]


def build(root: Path, corpus: Path, **changed: Any) -> Outcome:
    return documents_stage(run_file(root, documents={"corpus": [str(corpus)], **changed}), IN_PROCESS, lambda _: None)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"instruction": asked, "output": "It swam."} for asked in ("Who?", LONG, LONG + "?")]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_the_table_says_how_many_were_cut_and_its_plan_how(tmp_path: Path, corpus: Path) -> None:
    folder = student_tokenizer(tmp_path / "tokenizer")
    limit = {"max_prompt_tokens": 12, "prompt_tokenizer": str(folder)}

    made = build(tmp_path / "cut", corpus, **limit)
    build(tmp_path / "whole", corpus)

    assert "2 prompts cut to 12 tokens" in made.line
    table = Table(tmp_path / "cut", "documents")
    texts = [document_at(table[n]).text for n in range(len(table))]
    assert texts[0] == "Who?It swam."
    assert all(len(text) < len(LONG) and text.endswith("It swam.") for text in texts[1:])
    paths = (tmp_path / name / "documents" / "plan.json" for name in ("cut", "whole"))
    plans = [json.loads(path.read_text())["spec"] for path in paths]
    assert plans[0]["prompts"]["tokens"] == 12
    assert "prompts" not in plans[1]
    sample = read_sample(run_file(tmp_path / "s", documents={"corpus": [str(corpus)], **limit}), 9)
    assert [d.text for d in sample.documents] == texts


def test_a_row_whose_template_is_as_long_as_the_limit_is_rejected_by_name(tmp_path: Path, corpus: Path) -> None:
    folder = student_tokenizer(tmp_path / "tokenizer")
    limit = {"max_prompt_tokens": 3, "prompt_tokenizer": str(folder), "prompt_template": "alpaca", "max_reject": 1}

    with pytest.raises(Exception, match="long_prompt 3"):
        build(tmp_path / "cut", corpus, **limit)


def test_a_limit_without_a_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer counts them. Next: --prompt-tokenizer"):
        build(tmp_path / "cut", corpus, max_prompt_tokens=12)
