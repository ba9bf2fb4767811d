"""Held-out rows: the same forms and the same rejects as a corpus."""

import gzip
import json
from pathlib import Path

import pytest

import small_cache
from xkd_schemas.corpus.sources import held_out_documents
from xkd_schemas.errors import BadData, InputMissing, UsageError

ROWS = [{"prompt": "Who?", "response": "The keeper."}, {"prompt": "Where?", "response": "At home."}]


def test_rows_come_in_order_and_unusable_ones_are_counted(tmp_path: Path) -> None:
    path = small_cache.write_rows(tmp_path / "dev.jsonl", [ROWS[0], "{broken", {"prompt": "x"}, ROWS[1]])

    documents, rejected, _ = held_out_documents(path)

    assert [(d.text, d.line, d.source) for d in documents] == [
        ("Who?The keeper.", 1, "dev.jsonl"),
        ("Where?At home.", 4, "dev.jsonl"),
    ]
    assert [row.line for row in rejected] == [2, 3]


def test_all_references_of_a_row_are_given_by_its_line(tmp_path: Path) -> None:
    several = {"prompt": "Why?", "response": ["Duty.", "A lamp."]}

    documents, _, references = held_out_documents(small_cache.write_rows(tmp_path / "dev.jsonl", [ROWS[0], several]))

    assert (documents[1].text, references) == ("Why?Duty.", {2: ["Duty.", "A lamp."]})


def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    path = small_cache.write_rows(tmp_path / "dev.jsonl", [*ROWS, "", "  ", ""])

    documents, rejected, _ = held_out_documents(path)

    assert (len(documents), rejected) == (2, [])


def test_a_compressed_file_gives_the_same_documents(tmp_path: Path) -> None:
    plain = small_cache.write_rows(tmp_path / "dev.jsonl", ROWS)
    (tmp_path / "dev.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))

    packed, *_ = held_out_documents(tmp_path / "dev.jsonl.gz")

    assert [d.doc_id for d in packed] == [d.doc_id for d in held_out_documents(plain)[0]]


def test_what_is_no_source_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.csv").write_text("a,b\n")

    for name, kind in (("none.jsonl", InputMissing), ("folder", InputMissing), ("rows.csv", UsageError)):
        with pytest.raises(kind, match=rf"{name}\b.*Next: "):
            held_out_documents(tmp_path / name)


def test_an_empty_file_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"dev.jsonl has no rows"):
        held_out_documents(small_cache.write_rows(tmp_path / "dev.jsonl", []))


def test_rows_of_no_form_are_refused_with_their_columns(tmp_path: Path) -> None:
    path = small_cache.write_rows(tmp_path / "dev.jsonl", [{"q": "a", "a": "b"}])

    with pytest.raises(UsageError, match="no row fits any form; the rows have a, q"):
        held_out_documents(path)


def test_a_broken_archive_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-12])

    with pytest.raises(BadData, match=r"is broken or cut off: .*end-of-stream"):
        held_out_documents(tmp_path / "dev.jsonl.gz")
