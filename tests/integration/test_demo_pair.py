"""Every loss from one cache of the demo's teacher for the demo's student: real weights, real tokenizers, real text.

The assets are those of `python data/demo_assets.py --out demo`; XKD_DEMO names another folder that has them. Without
them this test is skipped: random models stand in for them in test_every_loss_trains and test_offline_equals_online.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import small_cache
from live_batch import both_terms, eager
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.config import RunConfig
from xkd_trainer.losses.registry import LOSSES, loss_named
from xkd_trainer.training.prepare import set_up

DEMO = Path(os.environ.get("XKD_DEMO") or Path(__file__).parents[2] / "demo")
ASSETS = ("teacher/model.safetensors", "tokenizer/tokenizer.json", "train.jsonl")
pytestmark = pytest.mark.skipif(
    not all((DEMO / name).exists() for name in ASSETS), reason="no demo assets: python data/demo_assets.py --out demo"
)

ROWS = 2
OTHER, SAME = "bpe-4k", "smollm2-own"
"""Student tables: with the demo's tokenizer, and with the teacher's own."""
TOKENIZERS = {OTHER: "tokenizer", SAME: "teacher"}
EVERYWHERE: dict[str, dict[str, object]] = {
    "losses.dskd_cma": {"correct_only": False}, "losses.dskd_cma_ga": {"correct_only": False},
    "losses.dskd_v2": {"agreement": False}
}  # fmt: skip
"""For losses side by side: a new student is never right or of one mind, and 0 is not compared with 0."""


def losses_of(table: str) -> list[str]:
    """All but CE that can be trained with a student of the table."""
    return [name for name in LOSSES if name != "ce" and loss_named(name).one_tokenizer == (table == SAME)]


def run_of(cache: Path, corpus: Path, table: str) -> RunConfig:
    return small_cache.run_file(
        cache,
        documents={"corpus": [str(corpus)], "rows_per_shard": 64},
        teacher={
            "model": str(DEMO / "teacher"), "name": "smollm2", "dtype": "float32", "losses": list(LOSSES),
            "batch_tokens": 1024,
        },
        student={
            "model": "new:llama,layers=4,width=128", "tokenizer": str(DEMO / TOKENIZERS[table]), "name": table,
            "template": "chat",
        },
        train={"loss": "+".join(["ce", *losses_of(table)])},
        **EVERYWHERE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What all losses need of the teacher, on a few short rows of the demo's text; MinED's search is made once."""
    folder = tmp_path_factory.mktemp("demo-pair")
    corpus = folder / "rows.jsonl"
    with (DEMO / "train.jsonl").open(encoding="utf-8") as lines:
        corpus.write_text("".join(islice((line for line in lines if 150 < len(line) < 200), ROWS)), encoding="utf-8")
    for number, table in enumerate(TOKENIZERS):
        run = run_of(folder / "cache", corpus, table)
        for stage in (documents_stage, teacher_stage, align_stage)[2 * min(number, 1) :]:
            stage(run, small_cache.IN_PROCESS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "kept"))
        yield folder / "cache"


@pytest.mark.parametrize("table", TOKENIZERS)
def test_every_term_from_the_cache_is_the_one_from_the_live_teacher(table: str, cache: Path) -> None:
    ready = set_up(run_of(cache, cache, table), table)

    cached, online = both_terms(ready, ready.cache.usable.tolist(), eager(DEMO / "teacher"))

    assert {name.partition(".")[0] for name in cached} == {"ce", *losses_of(table)}
    for name, value in online.items():
        assert value > 1e-3 or ".unpaired@" in name or name == "multilevelot.left_out", name
        assert cached[name] == pytest.approx(value, rel=0.01), name
