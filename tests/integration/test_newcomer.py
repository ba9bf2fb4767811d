"""What CONTRIBUTING.md promises to somebody who adds a parser or a codec; test_every_loss_trains adds a loss."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import small_cache
from xkd_pipeline.parsing import parsers
from xkd_pipeline.stages import documents_stage, teacher_stage
from xkd_schemas import codecs
from xkd_schemas.cache.rows import open_cache
from xkd_schemas.codecs import Bits, Encoded
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import Document, Spans


class FirstWords:
    """A parser of one class: the first word of each segment is a word and a noun phrase."""

    def __init__(self, _settings: Any) -> None:
        self.notes = Counter[str]()

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        firsts = [
            tuple((s.start, s.start + len(d.text[s.start : s.end].split()[0])) for s in d.segments) for d in documents
        ]
        return [Spans(words=first, phrases=first, labels=("NP",) * len(first)) for first in firsts]

    def identity(self) -> dict[str, str]:
        return {"kind": "first", "version": "1"}


class Inverted:
    """A codec of one class: every bit is turned."""

    def fields(self, column: str, width: int) -> list[tuple[str, pa.DataType]]:
        return codecs.Bf16().fields(column, width)

    def encode(self, column: str, rows: Sequence[Bits]) -> Encoded:
        return Encoded({column: [~row for row in rows]}, {})

    def decode(self, column: str, read: Any, _metadata: Mapping[bytes, bytes]) -> Bits:
        return np.asarray(~read(column), np.uint16)


def run_of(folder: Path) -> RunConfig:
    corpus = small_cache.write_rows(folder / "corpus.jsonl", small_cache.corpus_rows(3))
    return small_cache.run_file(
        folder / "cache",
        documents={"corpus": [str(corpus)]},
        teacher={"model": str(small_cache.llama(folder / "teacher")), "losses": ["dwa"]},
    )


def changed(run: RunConfig, section: str, **values: str) -> RunConfig:
    return run.model_copy(update={section: getattr(run, section).model_copy(update=values)})


def test_a_parser_and_a_codec_are_one_class_and_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parsers.PARSERS, "first", FirstWords)  # type: ignore[arg-type]
    monkeypatch.setitem(codecs.CODECS, "inverted", Inverted())  # type: ignore[arg-type]
    run = changed(changed(run_of(tmp_path), "documents", parser="first"), "teacher", codec="inverted")
    documents_stage(run, small_cache.IN_PROCESS)
    inverted = teacher_stage(run, small_cache.IN_PROCESS)
    teacher_stage(changed(changed(run, "teacher", codec="bf16"), "teacher", name="plain"), small_cache.IN_PROCESS)

    assert inverted.values["codec_error"]["hidden_last"] == 0.0
    rows, plain = (open_cache(tmp_path / "cache", teacher=name) for name in ("T", "plain"))
    assert rows[0].words == [rows[0].text.split()[0], "The"]
    assert rows[0].phrases == [("NP", word) for word in rows[0].words]
    for row, same in zip(rows, plain, strict=True):
        stored = row.teacher.row.stored("hidden_last")
        np.testing.assert_array_equal(row.teacher["hidden_last"], same.teacher["hidden_last"])
        assert np.array_equal(~stored, same.teacher.row.stored("hidden_last"))
