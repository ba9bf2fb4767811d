"""A teacher captured with each codec: what is read back, what the manifest says it cost, and the loss it gives."""

from pathlib import Path

import numpy as np
import pytest

import small_cache
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import numbers_of
from xkd_schemas.config import RunConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cache with one more teacher and student table for each codec that changes bytes."""
    cache = small_cache.copied(tmp_path_factory.mktemp("codecs"))
    for codec in ("bf16-planes", "int8"):
        for stage in (teacher_stage, align_stage):
            stage(run_with(cache, codec), small_cache.IN_PROCESS)
    return cache


def run_with(cache: Path, codec: str) -> RunConfig:
    return small_cache.whole_run(cache, teacher={"name": codec, "codec": codec}, student={"name": f"S-{codec}"})


@pytest.fixture
def tables(cache: Path) -> tuple[Table, Table, Table]:
    return tuple(Table(cache, f"teachers/{name}") for name in ("T", "bf16-planes", "int8"))  # type: ignore[return-value]


def wide(table: Table) -> list[str]:
    return [c for c in table.manifest.spec["signals"] if c.startswith(("hidden", "span_vectors"))]


def test_planes_change_no_bit_and_int8_none_but_of_states(tables: tuple[Table, Table, Table]) -> None:
    plain, planes, coded = tables
    columns = {*plain.manifest.spec["signals"], "token_ids", "targets"}
    assert wide(plain)
    for other, same in ((planes, columns), (coded, columns - set(wide(plain)))):
        for row in range(len(plain)):
            for column in same:
                assert np.array_equal(plain[row][column], other[row][column]), (row, column)
    error = planes.manifest.constants["codec_error"]
    assert {error[column] for column in (*wide(plain), "kl_nats")} == {0.0}


def test_int8_errs_as_much_as_the_manifest_says(tables: tuple[Table, Table, Table]) -> None:
    plain, _, coded = tables
    error = coded.manifest.constants["codec_error"]
    for column in wide(plain):
        lost = kept = 0.0
        for row in range(len(plain)):
            exact, got = (numbers_of(t[row][column]).astype(float) for t in (plain, coded))
            lost, kept = lost + np.square(exact - got).sum(), kept + np.square(exact).sum()
        assert 0 < error[column] < 0.03
        assert error[column] == pytest.approx(np.sqrt(lost / kept), rel=1e-9)
    assert 0 < error["kl_nats"] < 1e-3
    assert sum(c.size for c in coded.manifest.commits) < sum(c.size for c in plain.manifest.commits)


def test_losses_from_int8_are_close_to_those_from_bf16(cache: Path, tmp_path: Path) -> None:
    from xkd_trainer.training.loop import train

    terms = {}
    for table in ("S", "S-bf16-planes", "S-int8"):
        run = small_cache.whole_run(
            cache, student={"model": "new:llama,layers=2,width=16"},
            train={"loss": "mta+sra+dwa", "steps": 1, "batch_size": 12, "out": str(tmp_path / table)},
        )  # fmt: skip
        terms[table] = train(run, student_table=table, quiet=True).terms
    assert terms["S-bf16-planes"] == terms["S"]
    for name, value in terms["S"].items():
        assert terms["S-int8"][name] == pytest.approx(value, rel=0.02, abs=1e-3), name
