"""What CONTRIBUTING.md and docs/adding-a-loss.md promise to somebody who adds a parser, a codec or a loss.

test_every_loss_trains adds a loss to a copy of the trainer; here the example is installed as a package of its own.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import small_cache
from xkd_pipeline.cli.app import app as cache_app
from xkd_pipeline.parsing import parsers
from xkd_pipeline.stages import documents_stage, teacher_stage
from xkd_schemas import codecs
from xkd_schemas.cache.rows import open_cache
from xkd_schemas.codecs import Bits, Encoded
from xkd_schemas.documents import Document, Spans
from xkd_trainer.cli import app as train_app
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.registry import find_installed


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


def test_a_parser_and_a_codec_are_one_class_and_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parsers.PARSERS, "first", FirstWords)  # type: ignore[arg-type]
    monkeypatch.setitem(codecs.CODECS, "inverted", Inverted())  # type: ignore[arg-type]
    corpus = small_cache.write_rows(tmp_path / "corpus.jsonl", small_cache.corpus_rows(3))
    documents = {"corpus": [str(corpus)], "parser": "first"}
    teacher = {"model": str(small_cache.made() / "teacher"), "losses": ["dwa"]}
    run, other = (
        small_cache.run_file(
            tmp_path / "cache", documents=documents, teacher={**teacher, "name": name, "codec": codec}
        )
        for name, codec in (("T", "inverted"), ("plain", "bf16"))
    )
    documents_stage(run, small_cache.IN_PROCESS)
    inverted = teacher_stage(run, small_cache.IN_PROCESS)
    teacher_stage(other, small_cache.IN_PROCESS)

    assert inverted.values["codec_error"]["hidden_last"] == 0.0
    rows, plain = (open_cache(tmp_path / "cache", teacher=name) for name in ("T", "plain"))
    assert rows[0].words == [rows[0].text.split()[0], "The"]
    assert rows[0].phrases == [("NP", word) for word in rows[0].words]
    for row, same in zip(rows, plain, strict=True):
        stored = row.teacher.row.stored("hidden_last")
        np.testing.assert_array_equal(row.teacher["hidden_last"], same.teacher["hidden_last"])
        assert np.array_equal(~stored, same.teacher.row.stored("hidden_last"))


EXAMPLE = Path(__file__).parents[2] / "docs" / "example-loss"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *command, "--target", folder, EXAMPLE], check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        find_installed.cache_clear()
        yield
    find_installed.cache_clear()


@pytest.mark.usefixtures("installed")
def test_an_installed_loss_is_listed_with_its_settings_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    train_app(["losses", "--json"], standalone_mode=False)

    listed = json.loads(capsys.readouterr().out)
    assert listed["sureness"]["needs"] == ["entropy"]
    assert listed["sureness"]["settings"] == {"scale": 1.0}
    assert "ce" in listed


@pytest.mark.usefixtures("installed")
def test_capture_stores_what_an_installed_loss_needs_and_a_student_is_trained(tmp_path: Path) -> None:
    cache, student = small_cache.copied(tmp_path), small_cache.gpt2(tmp_path / "gpt2")
    loss = ["--loss", "ce=0+sureness", "--set", "losses.sureness.scale=2", "--steps", "12", "--lr", "2e-3"]
    for app, *words in (
        (cache_app, "teacher", cache, "--model", small_cache.made() / "teacher", "--for", "sureness",
         "--name", "sure", "--dtype", "float32"),
        (cache_app, "align", cache, "--student", student, "--teacher", "sure", "--name", "G"),
        (train_app, "--shards", cache, "--student", student, "--student-table", "G", *loss,
         "--set", "train.log_every=1", "--out", tmp_path / "out"),
    ):  # fmt: skip
        app([*map(str, words)], standalone_mode=False)

    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all(line["sureness.entropy.count"] > 0 for line in lines)
    assert lines[-1]["sureness.entropy"] < 0.5 * lines[0]["sureness.entropy"]


@pytest.mark.usefixtures("installed")
def test_the_gradient_of_the_example_is_that_of_the_plain_formula() -> None:
    from xkd_sureness import squared_gaps

    student_E = torch.tensor([0.3, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
    made: LossTerm = squared_gaps(student_E, torch.tensor([0.1, 2.5, 1.5], dtype=torch.float64), 0.5)

    assert torch.allclose(made.total, torch.tensor((0.2**2 + 0.5**2) / 0.25, dtype=torch.float64))
    made.total.backward()
    assert torch.allclose(student_E.grad, torch.tensor([1.6, -4.0, 0.0], dtype=torch.float64))
