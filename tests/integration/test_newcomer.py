"""What CONTRIBUTING.md promises to somebody who adds a loss, signal, parser or codec: so many places, and no other.

Of losses the example is also installed as a package of its own.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_cache
from forked import begun, wait_for
from xkd_pipeline.cli.app import app as cache_app
from xkd_pipeline.parsing import stage as parsing
from xkd_pipeline.stages import documents_stage, teacher_stage
from xkd_schemas import codecs
from xkd_schemas.cache.rows import open_cache
from xkd_schemas.codecs import Bits, Encoded
from xkd_schemas.config import RunConfig
from xkd_schemas.documents import Document, Spans
from xkd_train import xkd_train
from xkd_trainer.cli import app as train_app
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.registry import find_installed

ROOT = Path(__file__).parents[2]
TRAIN = """
import json, sys
from xkd_pipeline import preprocess
from xkd_schemas import RunConfig
from xkd_trainer import train
preprocess(RunConfig.load(None, **json.loads(sys.argv[1])))
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


class Inverted(codecs.Codec):
    """A codec of one class: every bit is turned."""

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
    monkeypatch.setitem(parsing.PARSERS, "first", f"{__name__}:FirstWords")
    monkeypatch.setitem(codecs.CODECS, "inverted", Inverted())
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


FUNCTION = """def surprise(logits_NV: Tensor) -> tuple[Tensor]:
    return (logits_NV.float().logsumexp(-1) - logits_NV.float().amax(-1),)
"""
FIELD = '    teacher_surprise_BM: Tensor | None = field(default=None, metadata={"signal": "surprise"})\n'
EDITS = {
    "losses/registry.py": [('    "mta": ', '    "sureness": "baselines.sureness:SURENESS",\n')],
    "models/measures.py": [("OF_STATES: Final", FUNCTION), ('("entropy", "argmax",', '("surprise",): surprise, ')],
    "data/batch.py": [("    teacher_argmax_BM:", FIELD)],
    "../xkd_schemas/signals.py": [('    "argmax": Kind(', '    "surprise": Kind("float32", "N", wide=False),\n')],
}  # fmt: skip


def test_a_loss_is_one_file_and_one_line_and_a_signal_a_line_a_function_and_a_field(tmp_path: Path) -> None:
    for package in ("schemas/xkd_schemas", "trainer/xkd_trainer", "pipeline/xkd_pipeline"):
        copy = tmp_path / Path(package).name
        shutil.copytree(ROOT / package, copy, ignore=shutil.ignore_patterns("__pycache__", "cpu_kernels"))
    for name, places in EDITS.items():
        path = tmp_path / "xkd_trainer" / name
        for before, new in places:
            text = path.read_text()
            assert text.count(before) == 1
            path.write_text(text.replace(before, new + before))
    loss = (
        (ROOT / "docs" / "example-loss" / "xkd_sureness.py").read_text().replace("teacher_entropy", "teacher_surprise")
    )
    new_loss = tmp_path / "xkd_trainer" / "losses" / "baselines" / "sureness.py"
    new_loss.write_text(loss.replace('Signal("entropy")', 'Signal("surprise")'))
    run = run_of(tmp_path)
    run = run.model_copy(update={"teacher": run.teacher.model_copy(update={"losses": ("sureness",)})})

    program = begun(TRAIN, tmp_path / "said", json.dumps(run.model_dump(exclude_unset=True)), path=tmp_path)
    (ended,) = wait_for([program], [tmp_path / "said"])

    assert ended.code == 0, ended.err
    assert np.isfinite(json.loads(ended.out.splitlines()[-1])["sureness.entropy"])
    assert (open_cache(tmp_path / "cache")[0].teacher.row["surprise"] > 0).all()


EXAMPLE = ROOT / "docs" / "example-loss"


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
def test_an_installed_loss_is_listed_and_capture_stores_what_it_needs_and_a_student_is_trained(tmp_path: Path) -> None:
    listed = json.loads(xkd_train("losses", "--json").out)
    assert (listed["sureness"]["needs"], listed["sureness"]["settings"]) == (["entropy"], {"scale": 1.0})
    assert "ce" in listed
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
