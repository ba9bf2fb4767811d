"""Teachers of other families from capture to a student's loss: the terms from the cache against the live teacher."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny_models as tiny
from families import HERE
from live_batch import both_terms, eager
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError
from xkd_trainer.training.prepare import set_up

ROWS = (0, 3, 7, 17, 19)
WORKERS = Workers(count=0)


def prepared(name: str, folder: Path, loss: str, **settings: Any) -> RunConfig:
    """A teacher of the family, documents that are ready, and a run file over both; nothing captured yet."""
    kind = tiny.TEACHER_TOKENIZER
    tiny.saved(HERE[name].made(len(tiny.tokenizer_of(kind))), kind, folder / "teacher")
    shutil.copytree(tiny.tiny_cache().cache / "documents", folder / "cache" / "documents")
    return tiny.tiny_cache().run(
        cache=str(folder / "cache"), teacher__model=str(folder / "teacher"), teacher__losses=loss.split("+"),
        loss=loss, losses={"sra": settings} if settings else {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "loss", "settings"),
    [
        ("gpt_oss", "mta+sra+dwa", {}),
        ("gemma3_text", "mta+sra+dwa", {}),
        ("opt, narrow embeddings (350m)", "sra+dwa", {}),
        ("bloom", "mta+sra+dwa", {"weights": "uniform"}),
    ],
)
def test_terms_from_the_cache_of_another_family_are_those_of_the_live_teacher(
    name: str, loss: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = prepared(name, tmp_path, loss, **settings)
    teacher_stage(run, WORKERS)
    align_stage(run, WORKERS)

    cached, online = both_terms(set_up(run, ""), ROWS, eager(tmp_path / "teacher"))

    assert {term.split(".")[0] for term in cached} == {"ce", *loss.split("+")}
    for term, value in online.items():
        assert cached[term] == pytest.approx(value, rel=0.01), term


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("bloom", "mta+sra", r"no attention map in its last block\. Next: .*--set losses\.sra\.weights=uniform"),
        ("opt, narrow embeddings (350m)", "mta", r"block 1 gives states of shape .*losses that read no inner layer"),
        ("bert-generation", "dwa", "no causal language model"),
    ],
)
def test_what_a_teacher_cannot_give_is_refused_before_its_table_is_begun(
    name: str, loss: str, message: str, tmp_path: Path
) -> None:
    run = prepared(name, tmp_path, loss)

    with pytest.raises(UsageError, match=message) as caught:
        teacher_stage(run, WORKERS)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "teachers").exists()
