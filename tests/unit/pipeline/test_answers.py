"""The two commands that answer prompts write the same rows; workers make whole units or none."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_models as tiny
from small_cache import asked, write_rows
from xkd_pipeline.answers import AnswersStage
from xkd_pipeline.workers.contract import AS_PLANNED, Workers
from xkd_pipeline.workers.scheduler import make_shards
from xkd_schemas.cache.manifest import MadeDifferently
from xkd_schemas.config import GenerationSection
from xkd_schemas.corpus.rows import RawRow
from xkd_schemas.errors import OutOfMemory
from xkd_trainer import answers
from xkd_trainer.answers import Answering, Prompts
from xkd_trainer.cli import app

KIND = "byte_level"
HOW = ("--n", 2, "--max-new-tokens", 4, "--batch-size", 4, "--keep-cut", "--dtype", "fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tiny.llama(KIND, seed=1), KIND, tmp_path_factory.mktemp("speaker"))


def test_generate_and_sample_write_the_same_rows_but_for_who_wrote_them(model: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"question": text} for text, _ in tiny.PAIRS[:5]])
    column = ("--column", "prompt=question")

    code, found = asked("generate", prompts, "--model", model, "--out", tmp_path / "a.jsonl", *HOW, *column)
    words = ["sample", model, "--data", prompts, "--out", tmp_path / "b.jsonl", *HOW, *column]
    result = CliRunner().invoke(app, [*map(str, words), "--json"])

    said = json.loads(result.stdout)
    assert (code, result.exit_code) == (0, 0)
    assert found | {"out": ""} == said | {"out": ""}
    assert (found["kept"], found["prompts"], found["made"]) == (10, 5, 3)
    theirs, own = ([json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_bytes().splitlines()] for n in "ab")
    assert [row | {"policy": "student"} for row in theirs] == own
    assert "policy" not in theirs[0]


def test_a_unit_is_made_as_planned_or_not_at_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = AnswersStage(
        answering=Answering(
            folder=tmp_path, model=str(model), template=None, enable_thinking=None, max_tokens=64, dtype="float32",
            device="cpu", form="prompt_response", columns={"prompt": "prompt"},
            how=GenerationSection(max_new_tokens=3, batch_size=4),
        )
    )  # fmt: skip
    job = Prompts(unit=3, rows=[RawRow(line=n, content=b'{"prompt": "Who?"}') for n in (9, 10)])
    make = stage.load()

    commit = make(job, AS_PLANNED)

    assert (commit.unit, commit.rows, commit.file) == (3, 2, next(tmp_path.glob("00003-*.jsonl")).name)
    assert commit.file[6:18] == commit.sha256[:12]
    assert (stage.rows(job), stage.batch(job), stage.paths()) == (0, 4, (tmp_path, model))
    with pytest.raises(OutOfMemory, match=r"unit 3: .*--batch-size 2"):
        make(job, MadeDifferently(batch=2))

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(answers, "generate", full)
    with pytest.raises(OutOfMemory, match=r"unit 3: out of memory with 4 answers at once"):
        make_shards(stage, [job], Workers(), lambda _commit: None)
