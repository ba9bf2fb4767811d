"""The students table: the student's own tokens, and beside them what the alignment functions say."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import small_cache
from normalising_tokenizers import normalising
from slow_alignment import align_one, exact_pairs, ranges_of
from small_cache import made
from xkd_pipeline.reports.report import gather
from xkd_pipeline.stages import Outcome, align_stage, documents_stage, teacher_stage
from xkd_pipeline.tables.shard import document_at, encoder_for
from xkd_schemas.cache.table import Row, Table
from xkd_schemas.config import TeacherSection
from xkd_schemas.errors import UsageError
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import tokens_at


def stage(cache: Path, *, teacher: str = "T", **student: object) -> Outcome:
    settings = {"tokenizer": str(made() / "student"), **student}
    run = small_cache.run_file(cache, student=settings)
    return align_stage(run.model_copy(update={"teacher": TeacherSection(name=teacher)}), small_cache.IN_PROCESS)


def joined(cache: Path, teacher: str = "T", student: str = "S") -> list[tuple[Row, Row, Row]]:
    tables = ("documents", f"teachers/{teacher}", f"students/{student}")
    return list(zip(*(Table(cache, name) for name in tables), strict=True))


def test_every_row_is_the_students_encoding_and_its_alignment_with_the_teacher() -> None:
    encoder = Encoder(tokenizer=AutoTokenizer.from_pretrained(made() / "student"), template="none", max_tokens=1024)
    rows = joined(made() / "cache")

    assert len(rows) == 12
    for document, taught, row in rows:
        tokens = encoder.encode(document_at(document))
        ours, theirs = align_one(tokens, tokens_at(taught), document["segments"][:, 1])
        assert row["doc_id"] == document["doc_id"]
        assert row["status"] == "ok"
        for column, expected in (
            ("token_ids", tokens.ids), ("token_spans", tokens.spans), ("token_kinds", tokens.kinds),
            ("targets", tokens.targets), ("student_spans", ours), ("teacher_spans", theirs),
            ("word_tokens", ranges_of(tokens, document["words"])),
            ("phrase_tokens", ranges_of(tokens, document["phrases"])),
        ):  # fmt: skip
            np.testing.assert_array_equal(row[column], expected, err_msg=column)


def test_the_outcome_counts_tokens_spans_and_exact_pairs() -> None:
    outcome = stage(made() / "cache")
    rows = [row for _, _, row in joined(made() / "cache")]

    spans = sum(len(row["student_spans"]) for row in rows)
    exact = sum(len(exact_pairs(row["student_spans"], row["teacher_spans"])) for row in rows)
    assert outcome.values["spans"] == spans
    assert outcome.values["exact_pairs"] == exact > 0
    assert outcome.values["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert outcome.values["targets"] == sum(int(row["targets"].sum()) for row in rows)
    assert f"{spans} aligned spans, {100 * exact / spans:.1f} % of them one token to one" in outcome.line
    aligned = sum(int(np.diff(row["student_spans"], axis=1).sum()) for row in rows)
    assert Table(made() / "cache", "students/S").manifest.count("aligned_tokens") == aligned


def test_a_document_that_the_teacher_could_not_read_says_so_and_has_no_tokens(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    settings = {"model": str(made() / "teacher"), "name": "short", "max_tokens": 8, "losses": ["dwa"]}
    teacher_stage(small_cache.run_file(cache, teacher=settings), small_cache.IN_PROCESS)

    outcome = stage(cache, teacher="short", name="unread")

    for document, taught, row in joined(cache, "short", "unread"):
        assert len(taught["token_ids"]) == len(taught["hidden_last"]) == len(taught["argmax"]) == 0
        assert row["status"] == "teacher:no_target_after_cut"
        for column in ("token_ids", "token_spans", "token_kinds", "targets", "student_spans", "teacher_spans"):
            assert len(row[column]) == 0, column
        assert row["word_tokens"].tolist() == [[0, 0]] * len(document["words"])
        assert row["phrase_tokens"].tolist() == [[0, 0]] * len(document["phrases"])
    assert "12 teacher:no_target_after_cut" in outcome.line
    assert outcome.values["spans"] == outcome.values["tokens"] == 0


def test_a_shorter_student_is_cut_and_aligned_up_to_there(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)

    outcome = stage(cache, name="short", max_tokens=50)

    read = [(taught, row) for _, taught, row in joined(cache, student="short") if row["status"] == "ok"]
    below = sum(row["num_chars"] < taught["num_chars"] for taught, row in read)
    assert max(len(row["token_ids"]) for _, row in read) <= 50
    for taught, row in read:
        assert taught["token_spans"][row["teacher_spans"][-1, 1] - 1, 1] <= row["num_chars"]
    assert Table(cache, "students/short").manifest.count("cut_below_teacher") == below > 0
    assert f"{below} cut to fit" in outcome.line


def test_tokenizer_and_constants_stand_beside_the_table() -> None:
    table = Table(made() / "cache", "students/S")
    tokenizer = AutoTokenizer.from_pretrained(table.folder / "tokenizer")

    assert table.manifest.constants == {"template": "none", "vocab_size": len(tokenizer), "teacher": "T"}
    text = "The old keeper lit the lamp 🙂."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(made() / "student")(text)["input_ids"]
    root = Table(made() / "cache", "teachers/T").manifest.root
    assert (table.manifest.spec["teacher"], table.manifest.spec["teacher_root"]) == ("T", root)


def test_no_student_tokenizer_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no student tokenizer is named.*--student FOLDER"):
        stage(made() / "cache", tokenizer="")
    with pytest.raises(UsageError, match="no student tokenizer is named"):
        stage(made() / "cache", tokenizer="", model="new:llama,layers=2")


def test_intervals_over_what_a_normaliser_merges_are_counted_and_reported(tmp_path: Path) -> None:
    rows = [*small_cache.corpus_rows(2), {"prompt": "Ou\u0300?", "response": "La fe\u0302te a e\u0301te\u0301."}]
    corpus = small_cache.write_rows(tmp_path / "rows.jsonl", rows)
    normalising("qwen").save_pretrained(tmp_path / "composing")
    run = small_cache.run_file(
        tmp_path / "cache", documents={"corpus": [str(corpus)]}, teacher={"model": str(made() / "teacher")},
        student={"tokenizer": str(tmp_path / "composing")},
    )  # fmt: skip
    documents_stage(run, small_cache.IN_PROCESS)
    assert teacher_stage(run, small_cache.IN_PROCESS).values["extended"] == 0

    outcome = align_stage(run, small_cache.IN_PROCESS)

    manifest = Table(tmp_path / "cache", "students/S").manifest
    assert outcome.values["extended"] == manifest.count("extended") >= 4
    assert manifest.count("extended_documents") == 1
    assert f"extended intervals: {manifest.count('extended')} tokens of 1 documents" in outcome.line
    titles = {title: number for _, title, number in gather(tmp_path / "cache")["cuts"]}
    assert titles["tokens with extended intervals"] == manifest.count("extended")


def test_unless_one_is_named_the_template_is_chat_where_the_tokenizer_has_one_and_is_said(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)

    assert "template chat, " in stage(cache, name="chat", tokenizer=str(made() / "teacher")).line

    assert Table(cache, "students/chat").manifest.constants["template"] == "chat"
    run = small_cache.run_file(cache, teacher={"template": "auto"})
    encoders = encoder_for(str(made() / "teacher"), run.teacher), encoder_for(str(made() / "student"), run.student)
    assert [encoder.template for encoder in encoders] == ["chat", "none"]
