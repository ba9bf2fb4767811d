"""The terms of every loss from the cache against the same terms from the live teacher in float32.

What lies between is what the cache rounds: last states and span vectors to bfloat16, cosines to float16.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import one_tokenizer as one
import tiny_models as tiny
from live_batch import both_terms, eager, live
from xkd_pipeline.stages import align_stage
from xkd_pipeline.workers.contract import Workers
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (0, 3, 7, 17, 19)
LOSSES = "ce+mta+sra+dwa+dskd_cma+dskd_v2+alm+mined+uld+multilevelot"
EVERYWHERE = {"dskd_cma": {"correct_only": False}, "dskd_v2": {"agreement": False}}
"""Random models are hardly ever right or of one mind; these settings compare all the same."""
WITHIN = {"mined.mined": 1e-4}
"""Mostly the corpus's own tokens: another teacher changes it by less than a hundredth."""


@pytest.fixture(scope="module")
def ready() -> Ready:
    torch.manual_seed(0)
    return set_up(tiny.tiny_cache().run(loss=LOSSES, losses=EVERYWHERE), "")


@pytest.fixture(scope="module")
def one_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A student with the teacher's tokenizer, for losses that need one."""
    folder, kind = tmp_path_factory.mktemp("one-tokenizer"), tiny.TEACHER_TOKENIZER
    student = tiny.saved(tiny.llama(kind, seed=2), kind, folder / "student")
    cache = Path(shutil.copytree(tiny.tiny_cache().cache, folder / "cache"))
    run = tiny.tiny_cache().run(
        cache=str(cache), loss="ce=0+dskd+kl", student__model=str(student), student__name="same"
    )
    align_stage(run, Workers(count=0))
    return set_up(run, "")


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return eager(tiny.tiny_cache().teacher)


@pytest.fixture(scope="module")
def stranger() -> PreTrainedModel:
    other = tiny.llama(tiny.TEACHER_TOKENIZER, seed=5, layers=4, width=32, tied=False)
    other.set_attn_implementation("eager")
    return other


def test_every_signal_of_a_batch_is_the_live_one_but_for_its_rounding(ready: Ready, teacher: PreTrainedModel) -> None:
    batch = batch_of(ready.cache, ROWS, ready.wanted)
    online = live(batch, ready.cache, teacher)

    close(batch.teacher_hidden_BRD, online.teacher_hidden_BRD, rtol=2**-8, atol=1e-4)
    close(batch.states(4).attention_text_BT, online.states(4).attention_text_BT, rtol=1e-3, atol=1e-6)
    close(batch.teacher_entropy_BM, online.teacher_entropy_BM, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.teacher_argmax_BM, online.teacher_argmax_BM)
    for stored, now in zip(batch.levels, online.levels, strict=True):
        close(stored.mass_BU, now.mass_BU, rtol=1e-3, atol=1e-6)
        close(stored.vectors_BUD, now.vectors_BUD, rtol=2**-8, atol=1e-4)
        both_BUU = stored.valid_BU[:, :, None] & stored.valid_BU[:, None, :]
        close(stored.cosines_BUU[both_BUU], now.cosines_BUU[both_BUU], rtol=0, atol=2**-10)


def close(stored: Tensor | None, now: Tensor | None, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(stored.float(), now, rtol=rtol, atol=atol)


def test_every_term_from_the_cache_is_the_one_from_the_live_teacher_and_not_from_another(
    ready: Ready, teacher: PreTrainedModel, stranger: PreTrainedModel
) -> None:
    cached, online = both_terms(ready, ROWS, teacher)
    _, others = both_terms(ready, ROWS, stranger)

    assert {name.split(".")[0] for name in cached} == set(LOSSES.split("+"))
    same_terms(cached, online)
    moved = {name for name in others if cached[name] != pytest.approx(others[name], rel=WITHIN.get(name, 0.01))}
    assert {"mta.dsa@2:word", "mta.dsa@3:phrase", "sra.geo", "dwa.student_space", "dwa.dtw_states"} <= moved
    assert {"dskd_cma.teacher_space", "dskd_v2.projected_ce", "dskd_v2.teacher_space"} <= moved
    assert {"alm.alm", "uld.l1", "mined.mined", "multilevelot.sequence"} <= moved


def same_terms(cached: dict[str, float], online: dict[str, float]) -> None:
    for name, value in online.items():
        assert abs(value) > 1e-3, f"{name} is too small to be compared"
        assert cached[name] == pytest.approx(value, rel=WITHIN.get(name, 0.01)), name


def test_so_is_every_term_of_the_losses_for_one_tokenizer(one_tokenizer: Ready, teacher: PreTrainedModel) -> None:
    cached, online = both_terms(one_tokenizer, ROWS, teacher)

    assert sorted(cached) == ["dskd.projected_ce", "dskd.student_space", "dskd.teacher_space", "kl.kl"]
    same_terms(cached, online)


READS_LAYERS: dict[str, dict[str, Any]] = {
    "mta": {"hid": "token", "student_pooling": "teacher", "span_weights": "entropy"},
    "sra": {"layers": [2, 3]},
    "fdd": {"layers": [1, 2, 4]},
}


@pytest.mark.parametrize("loss", READS_LAYERS)
def test_so_is_every_term_of_the_losses_that_read_layers(
    loss: str, teacher: PreTrainedModel, stranger: PreTrainedModel
) -> None:
    ready, _ = one.ready(loss, **READS_LAYERS[loss])

    cached, online = both_terms(ready, ROWS, teacher)
    _, others = both_terms(ready, ROWS, stranger)

    assert len(cached) >= 3
    same_terms(cached, online)
    moved = {name for name in cached if cached[name] != pytest.approx(others[name], rel=0.01)}
    assert {"mta": {"mta.hid@2:word"}, "sra": {"sra.cos@2"}, "fdd": {"fdd.trajectory"}}[loss] <= moved


def test_the_stored_embeddings_and_constants_are_the_teachers(ready: Ready, teacher: PreTrainedModel) -> None:
    torch.testing.assert_close(
        ready.cache.embeddings().float(), teacher.get_input_embeddings().weight.detach(), rtol=0.01, atol=0
    )
    sizes, constants = ready.cache.sizes, ready.cache.teachers.manifest.constants
    assert (sizes.hidden_std, sizes.embedding_std) == (constants["hidden_std"], constants["embedding_std"])
