"""From corpus rows to the documents table: nothing is lost in silence, and the table is the same however made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from small_cache import IN_PROCESS, SPACY, corpus_rows, files_of, llama, run_file, write_rows
from xkd_pipeline import stages
from xkd_pipeline.parsing.stage import parser_for
from xkd_pipeline.stages import Outcome, documents_stage
from xkd_pipeline.tables.shard import document_at
from xkd_schemas.cache.manifest import Plan, read_record
from xkd_schemas.cache.table import Table
from xkd_schemas.config import DocumentsSection
from xkd_schemas.corpus.rows import RawRow, read_documents
from xkd_schemas.corpus.sources import open_source
from xkd_schemas.documents import documents_schema, schema_of
from xkd_schemas.errors import BadData


def build(root: Path, corpora: Sequence[Path | str], **changed: Any) -> Outcome:
    sections = {"documents": {"corpus": [str(path) for path in corpora], "rows_per_shard": 3, **changed}}
    sections["documents.columns"] = sections["documents"].pop("columns", {})
    return documents_stage(run_file(root, **sections), IN_PROCESS, lambda _line: None)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """10 rows, of which the 2nd is no JSON and the 8th has no response."""
    rows: list[Any] = corpus_rows(10)
    rows[1], rows[7] = '{"prompt": ', {"prompt": "And?"}
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_the_table_holds_what_reader_and_parser_find_in_each_row(tmp_path: Path, corpus: Path) -> None:
    build(tmp_path / "c", [corpus], max_reject=1)
    table = Table(tmp_path / "c", "documents")

    raw = [RawRow(line=n, content=line) for n, line in enumerate(corpus.read_bytes().splitlines(), start=1)]
    source = open_source(str(corpus), columns={})
    documents, _ = read_documents("rows.jsonl", source.form, source.columns, raw)
    spans = parser_for(DocumentsSection(spacy_model=SPACY)).parse(documents)
    assert [document_at(row) for row in table] == documents
    assert [row["doc_id"] for row in table] == [d.doc_id for d in documents]
    for row, found in zip(table, spans, strict=True):
        assert row["words"].tolist() == [list(word) for word in found.words]
        assert row["phrases"].tolist() == [list(phrase) for phrase in found.phrases]
        assert tuple(row["labels"]) == found.labels
    assert table.manifest.count("words") == sum(len(s.words) for s in spans)
    assert table.manifest.count("phrases") == sum(len(s.phrases) for s in spans)
    assert table.manifest.count("characters") == sum(len(d.text) for d in documents)


def test_rejected_rows_are_counted_and_listed_with_file_line_and_reason(tmp_path: Path, corpus: Path) -> None:
    outcome = build(tmp_path / "c", [corpus], max_reject=0.2)

    files = sorted((tmp_path / "c/documents/rejects").iterdir())
    listed = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    assert [(r["line"], r["reason"]) for r in listed] == [(2, "bad_json"), (8, "missing_field")]
    assert {r["source"] for r in listed} == {"rows.jsonl"}
    assert all(r["detail"] for r in listed)
    assert "8 documents" in outcome.line
    assert "2 rows rejected" in outcome.line
    assert (outcome.values["documents"], outcome.values["rejected"]) == (8, 2)


def test_too_many_rejects_stop_the_run_and_a_higher_limit_goes_on_from_there(tmp_path: Path, corpus: Path) -> None:
    build(tmp_path / "undisturbed", [corpus], max_reject=0.2)
    with pytest.raises(BadData) as caught:
        build(tmp_path / "c", [corpus], max_reject=0.1)
    message = str(caught.value)
    assert "2 of 9 rows cannot be used (bad_json 1, missing_field 1), more than --max-reject 0.1 allows" in message
    assert "the first: row 2, " in message
    assert message.endswith("or name other columns with --column, or accept them with --max-reject 0.24")

    outcome = build(tmp_path / "c", [corpus], max_reject=0.22)

    assert (outcome.values["made"], outcome.values["reused"]) == (1, 3)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("rows", [["{broken", "x"], [{"prompt": "a", "response": " "}]])
def test_a_corpus_without_a_usable_row_is_bad_data_whatever_is_allowed(tmp_path: Path, rows: list[Any]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)

    for _ in range(2):  # the second time from what the first has kept
        with pytest.raises(BadData, match=rf"no usable row in {len(rows)} \(\w+ {len(rows)}\)"):
            build(tmp_path / "c", [path], max_reject=1, form="prompt_response")


def test_two_files_of_one_name_are_both_read_and_a_file_that_is_named_twice_is_read_twice(tmp_path: Path) -> None:
    for n, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", corpus_rows(5)[2 * n : 2 * n + 2])

    build(tmp_path / "c", [tmp_path / name / "rows.jsonl" for name in "aba"])

    texts = [row["text"] for row in Table(tmp_path / "c", "documents")]
    assert texts == [row["prompt"] + row["response"] for row in [*corpus_rows(4), *corpus_rows(2)]]


def test_from_which_folder_a_corpus_is_named_does_not_matter(tmp_path: Path, monkeypatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", corpus_rows(5))
    build(tmp_path / "c", [path])
    monkeypatch.chdir(tmp_path)

    outcome = build(tmp_path / "c", ["rows.jsonl"])

    assert outcome.values["made"] == 0
    assert all(str(tmp_path).encode() not in content for content in files_of(tmp_path / "c").values())


def test_shards_missing_in_the_middle_are_read_from_the_right_rows(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", corpus_rows(8 + n)) for n in range(2)]
    build(tmp_path / "c", paths)
    before = files_of(tmp_path / "c")
    units = read_record(tmp_path / "c/documents/plan.json", Plan).units
    assert [(unit.first, unit.rows) for unit in units] == [(0, 3), (3, 3), (6, 2), (0, 3), (3, 3), (6, 3)]
    for unit in (1, 3, 5):
        (tmp_path / f"c/documents/commits/{unit:05d}.json").unlink()

    outcome = build(tmp_path / "c", paths)

    assert (outcome.values["made"], outcome.values["reused"]) == (3, 3)
    assert files_of(tmp_path / "c") == before


def test_a_shard_is_a_minute_of_a_teacher_by_characters_decided_once_and_printed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stages, "this_device", lambda: "cpu")
    monkeypatch.setitem(stages.FLOPS, "cpu", 8e9)  # 4,800 characters
    said: list[str] = []
    rows = {"short": [{"text": "x" * 100}] * 40, "sorted": [{"text": "x" * 10}] * 30 + [{"text": "y" * 1000}] * 10}
    for name, content in rows.items():
        corpus = write_rows(tmp_path / f"{name}.jsonl", content)
        run = run_file(tmp_path / name, documents={"corpus": [str(corpus)], "rows_per_shard": 0})
        documents_stage(run, IN_PROCESS, said.append)
    sizes = {name: [c.rows for c in Table(tmp_path / name, "documents").manifest.commits] for name in rows}
    assert sizes == {"short": [40], "sorted": [4] * 10}
    assert "4 rows: about 4,800 characters, which a teacher of 0.2 billion weights reads in a minute" in said[-1]

    monkeypatch.setattr(stages, "this_device", lambda: "cuda")
    assert documents_stage(run, IN_PROCESS, said.append).values["made"] == 0
    assert "shards of" not in said[-1]
    llama(tmp_path / "teacher")
    named = run_file(tmp_path / "new", documents={"rows_per_shard": 0}, teacher={"model": str(tmp_path / "teacher")})
    assert stages.rows_per_shard(named, [open_source(str(corpus), columns={})])[0] == stages.MOST_CHARS // 1000


def test_a_policy_is_the_last_column_of_all_sources_where_one_has_it_and_of_no_other_table(tmp_path: Path) -> None:
    said = [row | {"policy": "student"} for row in corpus_rows(3)]
    plain = write_rows(tmp_path / "plain.jsonl", [row | {"policy": "x" * 99} for row in corpus_rows(2)])
    chat = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in said
    ]
    other = write_rows(tmp_path / "chat.jsonl", [{**row, "policy": "teacher"} for row in chat])
    own = write_rows(tmp_path / "own.jsonl", [*said, {"prompt": "Who?", "response": "Nobody.", "policy": None}])

    outcome = build(tmp_path / "c", [plain, other, own])
    build(tmp_path / "plain", [plain])

    table = Table(tmp_path / "c", "documents")
    assert [row["policy"] for row in table] == ["", "", *["teacher"] * 3, *["student"] * 3, ""]
    assert table.shard(0).schema.equals(schema_of(table.manifest.spec))
    assert [document_at(table[2]).policy, outcome.values["unused"]] == ["teacher", {}]
    without = Table(tmp_path / "plain", "documents")
    assert without.shard(0).schema.equals(documents_schema(2))
    assert "policy" not in without.manifest.spec
    assert table[0]["doc_id"] == table[5]["doc_id"]


def test_a_policy_that_is_no_short_text_behind_the_first_rows_is_a_reject(tmp_path: Path) -> None:
    rows: list[Any] = [row | {"policy": "student"} for row in corpus_rows(70)]
    rows[68]["policy"], rows[69]["policy"] = 5, "x" * 41

    assert build(tmp_path / "c", [write_rows(tmp_path / "rows.jsonl", rows)], max_reject=1).values["rejected"] == 2


def test_a_shard_of_a_streamed_teacher_takes_four_times_as_long_as_reading_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stages, "this_device", lambda: "cpu")
    monkeypatch.setattr(stages, "SECONDS", 1e-9)
    monkeypatch.setitem(stages.FLOPS, "cpu", 1e12)
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "x" * 100}] * 100)
    source, model = open_source(str(corpus), columns={}), str(llama(tmp_path / "teacher"))
    rows = {}
    for streamed in (True, False):
        run = run_file(tmp_path, documents={"rows_per_shard": 0}, teacher={"model": model, "stream_layers": streamed})
        rows[streamed], why = stages.rows_per_shard(run, [source])
        assert ("its blocks are not read from disk most of the time" in why) == streamed

    read, compute = 2 / stages.DISK, 2 * rows[True] * 100 / stages.CHARS_PER_TOKEN / 1e12  # of one weight
    assert compute == pytest.approx(4 * read)
    assert rows[False] == 1
