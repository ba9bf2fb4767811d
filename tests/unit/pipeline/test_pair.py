"""Two tokenizers compared: figures against counts made by hand, and what a terminal is shown."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers

import four_tokenizers
import tiny_models as tiny
from four_tokenizers import encoder_of
from normalising_tokenizers import normalising
from small_cache import corpus_rows, made, run_file, write_rows
from xkd_pipeline.cli.app import app
from xkd_pipeline.reports import compare as pair_models
from xkd_pipeline.reports.compare import compare, compare_models, normaliser_of, pair_lines, special_differences
from xkd_pipeline.reports.sample import read_sample
from xkd_schemas.cache.table import Table
from xkd_schemas.text.encode import Encoder
from xkd_trainer.models.bits_per_byte import bits_per_byte
from xkd_trainer.models.loading import load_model

BOTH = ("byte_level", "sentencepiece")


def command(*arguments: object) -> None:
    app(["pair", *map(str, arguments)], standalone_mode=False)


def compared(
    tmp_path: Path, rows: Sequence[object], teacher: Encoder | None = None, student: Encoder | None = None, **more: int
) -> dict[str, Any]:
    corpus = write_rows(tmp_path / "rows.jsonl", rows)
    sample = read_sample(run_file(tmp_path / "c", documents={"corpus": [str(corpus)]}), 100)
    models = teacher or encoder_of("byte_level"), student or encoder_of("unigram")
    return compare(*models, sample, **{"worst": 1, "width": 80, **more})


def test_a_tokenizer_goes_with_itself_perfectly(tmp_path: Path) -> None:
    one = encoder_of("byte_level")

    found = compared(tmp_path, corpus_rows(4), one, one)

    size = len(one.tokenizer.get_vocab())
    assert found["vocabulary"] == {"teacher": size, "student": size, "shared": size, "same_strings": size}
    assert (found["exact_share"], list(found["span_lengths"])) == (1.0, ["1:1"])
    assert found["special_tokens"] == []
    assert found["fertility"]["teacher"] == found["fertility"]["student"]
    assert found["worst"][0]["exact_share"] == 1.0


def test_spans_and_exact_pairs_are_those_of_the_cache(tmp_path: Path) -> None:
    teacher = Encoder(tokenizer=four_tokenizers.chat_tokenizer(), template="chat", max_tokens=1024)

    found = compared(tmp_path, corpus_rows(12), teacher)

    manifest = Table(made() / "cache", "students/S").manifest
    assert (found["spans"], found["exact_pairs"]) == (manifest.count("spans"), manifest.count("exact_pairs"))
    assert found["spans"] == sum(found["span_lengths"].values())
    assert 0 < found["exact_share"] < 1


def test_fertility_is_content_tokens_over_words_and_characters(tmp_path: Path) -> None:
    found = compared(tmp_path, [{"prompt": "ab cd", "response": " ef"}])

    tokens = len(four_tokenizers.tokenizer_of("byte_level")("ab cd", add_special_tokens=False)["input_ids"])
    tokens += len(four_tokenizers.tokenizer_of("byte_level")(" ef", add_special_tokens=False)["input_ids"])
    assert found["fertility"]["teacher"] == {
        "tokens": tokens, "per_word": pytest.approx(tokens / 3), "per_character": pytest.approx(tokens / 8)
    }  # fmt: skip


def test_special_tokens_that_differ_are_named() -> None:
    one = four_tokenizers.tokenizer_of("byte_level")
    other = copy.deepcopy(one)
    other.eos_token = "<other>"

    (found,) = [d for d in special_differences(one, other) if d["token"] == "eos_token"]

    assert found == {"token": "eos_token", "teacher": one.eos_token, "student": "<other>"}


def test_normalisers_are_named_in_order() -> None:
    tokenizer = copy.deepcopy(four_tokenizers.tokenizer_of("byte_level"))
    assert normaliser_of(tokenizer) == "none"

    backend = tokenizer.backend_tokenizer
    parts = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex("x+"), "y")]
    backend.normalizer = normalizers.Sequence(parts)
    assert normaliser_of(tokenizer) == 'NFKC, Lowercase, Replace {"Regex": "x+"} by "y"'


def test_a_document_that_one_side_cannot_use_is_counted_with_its_reason(tmp_path: Path) -> None:
    rows = [*corpus_rows(2), {"prompt": "word " * 60, "response": "Yes."}, "{"]

    found = compared(tmp_path, rows, encoder_of("byte_level", max_tokens=40))

    assert found["unusable"]["teacher"]["no_target_after_cut"]["documents"] == 1
    assert found["aligned_documents"] == 2
    assert found["sample"]["rejected"] == 1
    lines = "\n".join(pair_lines(found))
    assert "teacher cannot use 1 documents (no_target_after_cut)" in lines
    assert "1 rejected (bad_json 1)" in lines


def test_the_least_aligned_document_is_drawn_with_both_tokenizations(tmp_path: Path) -> None:
    rows = corpus_rows(6)

    found = compared(tmp_path, rows, worst=6)

    shares = [document["exact_share"] for document in found["worst"]]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    (alone,) = compared(tmp_path, [rows[found["worst"][0]["line"] - 1]])["worst"]
    assert alone["exact_share"] == shares[0]
    drawn = found["worst"][0]["drawing"]
    assert any(line.startswith("teacher  ") for line in drawn)
    assert any(line.startswith("student  ") for line in drawn)


def test_hostile_text_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a\x1b[2Jb\u202e", "response": "c\x07d"}, *corpus_rows(1)]
    corpus = write_rows(tmp_path / "rows\x1b[31m.jsonl", rows)

    command(made() / "teacher", made() / "student", corpus, "--sample", 9, "--worst", 9, "--width", 80)

    out = capsys.readouterr().out
    assert "least aligned" in out
    assert not set(out) & {"\x1b", "\u202e", "\x07"}


def test_bits_per_byte_of_both_models_are_over_the_same_characters(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "rows.jsonl", corpus_rows(4))
    sample = read_sample(run_file(tmp_path / "c", documents={"corpus": [str(corpus)]}), 9)
    folders = [str(tiny.saved(tiny.llama(k, seed=n, layers=1, width=8), k, tmp_path / k)) for n, k in enumerate(BOTH)]
    theirs, ours = encoder_of(BOTH[0], max_tokens=40), encoder_of(BOTH[1], max_tokens=30)

    found = compare_models((folders[0], folders[1]), (theirs, ours), "float32", sample)

    first = [row.num_chars for row in theirs.encode_batch(sample.documents)]
    ends = [row.num_chars for row in ours.encode_batch(sample.documents, first)]
    assert any(end < len(d.text) for end, d in zip(ends, sample.documents, strict=True))
    for side, folder, reader in zip(("teacher", "student"), folders, (theirs, ours), strict=True):
        rows = [reader.encode(*both) for both in zip(sample.documents, ends, strict=True)]
        pairs = list(zip(sample.documents, rows, strict=True))
        alone = bits_per_byte(load_model(folder, dtype=torch.float32), pairs)
        assert (found[side], found["bytes"]) == (pytest.approx(alone["bits_per_byte"], rel=1e-5), alone["bytes"])
    assert found["documents"] == len(sample.documents)


def test_a_teacher_no_better_than_the_untrained_student_is_warned_about(monkeypatch, capsys) -> None:
    monkeypatch.setattr(pair_models, "bits_per_byte", lambda *_: {"bytes": 9, "bits_per_byte": 1.5})

    folder = str(made() / "teacher")
    command(folder, folder, made() / "corpus.jsonl", "--sample", 5, "--worst", 0, "--with-models")

    out = capsys.readouterr().out
    assert "bits per byte of 5 documents' targets: teacher 1.500, untrained student 1.500" in out
    assert "warning: the teacher is not better than the untrained student on these rows" in out
    better = {"documents": 5, "teacher": 1.25, "student": 1.5, "dtype": "float32", "teacher_is_better": True}
    assert "warning" not in "\n".join(pair_models.model_lines(better))


def test_intervals_over_what_a_normaliser_merges_are_counted_for_each_side(tmp_path: Path) -> None:
    rows = [*corpus_rows(2), {"prompt": "Cafe\u0301?", "response": "Ange\u0301lique and e\u0301."}]
    changing = Encoder(tokenizer=normalising("qwen"), template="none", max_tokens=1000)

    found = compared(tmp_path, rows, changing, encoder_of("byte_level"))

    assert found["extended"]["teacher"]["extended_documents"] == 1
    assert found["extended"]["teacher"]["extended"] >= 3
    assert found["extended"]["student"] == {"extended": 0, "extended_documents": 0}
    assert found["aligned_documents"] == 3
    (line,) = [line for line in pair_lines(found) if "extended" in line]
    assert line.startswith(f"teacher: extended intervals: {found['extended']['teacher']['extended']} tokens of 1 doc")
