"""Training opens a shard when a document of it is asked for, and no other."""

from pathlib import Path

import pytest

from benchmarks.bench_memory import repeated
from benchmarks.bench_start import TINY
from benchmarks.measure import in_subprocess
from benchmarks.pair import made
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig
from xkd_trainer.data.sampler import Order

pytestmark = pytest.mark.filterwarnings("ignore")
SHARDS = 20


def test_training_opens_the_shards_of_the_documents_of_its_steps_and_no_other(tmp_path: Path) -> None:
    pair = made(tmp_path / "pair", TINY)
    cache = repeated(pair.cache, tmp_path / "many", SHARDS)

    found = in_subprocess(
        "benchmarks.bench_start", cache, pair.student, pair.tokenizer, pair.template, tmp_path / "out"
    )

    rows = Order(size=SHARDS * TINY.documents, batch_size=2, seed=RunConfig().train.seed).step(0)
    needed = [
        f"{name}/{Table(cache, name).manifest.commits[int(row) // TINY.documents].file}"
        for name in ("documents", "teachers/teacher", "students/student")
        for row in rows
    ]
    assert len(set(needed)) == 6
    read = [path for path in found["opened"] if not path.startswith("students/") or path in needed]
    assert sorted(read) == sorted(needed)  # saving the student looks at how the first rows of its table end
    assert 0 < found["imports"] < found["first"]
