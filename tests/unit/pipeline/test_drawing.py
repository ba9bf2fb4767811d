"""Finding a document, and drawing what there is of it."""

import shutil
from pathlib import Path

import pytest

import small_cache
from small_cache import made
from xkd_pipeline.reports.show import draw, find
from xkd_pipeline.stages import documents_stage
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import InputMissing, UsageError


def documents() -> Table:
    return Table(made() / "cache", "documents")


def test_a_document_is_found_by_row_by_id_and_by_the_beginning_of_its_id() -> None:
    ids = [row["doc_id"] for row in documents()]

    assert [find(documents(), str(n)) for n in range(12)] == list(range(12))
    assert [find(documents(), doc_id) for doc_id in ids] == list(range(12))
    short = next(n for n in range(3, 16) if len({i[:n] for i in ids}) == 12 and not ids[5][:n].isdecimal())
    assert find(documents(), ids[5][:short]) == 5


@pytest.mark.parametrize("doc", ["12", "-1", "zzz", "", "²"])
def test_a_document_that_is_not_there_is_missing_with_the_number_there_are(doc: str) -> None:
    with pytest.raises(InputMissing, match=rf"no document {doc!r} among 12\. Next: give a row number"):
        find(documents(), doc)


def test_a_beginning_that_fits_several_documents_is_not_guessed() -> None:
    table = [{"doc_id": doc_id} for doc_id in ("ab10", "ab20", "c300")]

    with pytest.raises(UsageError, match=r"2 documents begin with 'ab'.*give more digits"):
        find(table, "ab")
    assert find(table, "ab2") == 1


def test_a_text_that_the_corpus_has_twice_is_found_once(tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "response": "Nobody."}] * 2
    corpus = small_cache.write_rows(tmp_path / "c.jsonl", rows)
    documents_stage(
        small_cache.run_file(tmp_path / "cache", documents={"corpus": [str(corpus)]}), small_cache.IN_PROCESS
    )
    table = Table(tmp_path / "cache", "documents")

    assert find(table, table[1]["doc_id"]) == 0


def test_with_both_tables_both_tokenizations_are_drawn() -> None:
    lines = draw(made() / "cache", "0", teacher="T", student="S", width=100)

    assert lines[0].startswith(documents()[0]["doc_id"])
    assert "corpus.jsonl:1" in lines[0]
    assert any(line.startswith("teacher") for line in lines)
    assert any(line.startswith("student") for line in lines)
    assert any("[NP The old keeper]" in line for line in lines)
    assert max(map(len, lines)) <= 100


def test_without_a_student_the_teachers_tokens_are_drawn() -> None:
    lines = draw(made() / "cache", "1", teacher="T", student="", width=80)

    assert any(line.startswith("teacher") for line in lines)
    assert not any(line.startswith("student") for line in lines)


def test_without_any_model_the_phrases_are_drawn(tmp_path: Path) -> None:
    shutil.copytree(made() / "cache" / "documents", tmp_path / "documents")

    lines = draw(tmp_path, "0", teacher="", student="", width=80)

    assert lines[0] == f"{documents()[0]['doc_id']}  corpus.jsonl:1"
    assert "[NP The old keeper] [VP lit] [NP it]" in " ".join(lines[1:])


def test_a_hostile_text_is_drawn_without_a_character_that_a_terminal_obeys(tmp_path: Path) -> None:
    corpus = small_cache.write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "response": "b\x1b[2J\u202ec\nd\x07"}])
    documents_stage(
        small_cache.run_file(tmp_path / "cache", documents={"corpus": [str(corpus)]}), small_cache.IN_PROCESS
    )

    drawn = "".join(draw(tmp_path / "cache", "0", teacher="", student="", width=80))

    assert not {"\x1b", "\x07", "\n", "\u202e"} & set(drawn)
