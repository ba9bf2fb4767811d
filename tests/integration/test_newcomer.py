"""What CONTRIBUTING.md promises to somebody who adds a loss, a parser or a codec: so many places, and no other."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import small_cache
from xkd_pipeline.parsing import parsers
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas import codecs
from xkd_schemas.cache.rows import open_cache
from xkd_schemas.codecs import Bits, Encoded
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import Document, Spans

ROOT = Path(__file__).parents[2]
TRAIN = """
import json, sys
from xkd_schemas import RunConfig
from xkd_trainer import train
print(json.dumps(train(RunConfig.load(None, **json.loads(sys.argv[1])), quiet=True).terms))
"""


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
        student={"tokenizer": str(folder / "teacher"), "model": "new:llama,layers=2,width=16"},
        train={"out": str(folder / "out"), "loss": "ce=1+sureness=1", "steps": 1, "batch_size": 3},
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


def test_a_loss_is_one_file_and_its_import_and_name_in_the_registry(tmp_path: Path) -> None:
    for package in ("schemas/xkd_schemas", "trainer/xkd_trainer"):
        copy = tmp_path / Path(package).name
        shutil.copytree(ROOT / package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    losses = tmp_path / "xkd_trainer" / "losses"
    shutil.copy(ROOT / "docs" / "example-loss" / "xkd_sureness.py", losses / "baselines" / "sureness.py")
    before = (losses / "registry.py").read_text()
    named = before.replace("(CE, KL,", "(CE, SURENESS, KL,", 1)
    line = "from xkd_trainer.losses.baselines.sureness import SURENESS\n"
    after = named.replace("from xkd_trainer.losses.declaration", f"{line}from xkd_trainer.losses.declaration", 1)
    assert after.count("SURENESS") == before.count("SURENESS") + 2
    (losses / "registry.py").write_text(after)
    run = run_of(tmp_path)
    for stage in (documents_stage, teacher_stage, align_stage):
        stage(run, small_cache.IN_PROCESS)

    code = [sys.executable, "-c", TRAIN, json.dumps(run.model_dump(exclude_unset=True))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(code, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert np.isfinite(json.loads(ended.stdout.splitlines()[-1])["sureness.entropy"])
