"""The terms of every loss from the cache against the same terms from the live teacher in float32.

What lies between is what the cache rounds: last states and span vectors to bfloat16, cosines to float16.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import one_tokenizer as one
import tiny_models as tiny
from live_batch import both_terms, eager
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (0, 3, 7, 17, 19)
LOSSES = "ce+mta+sra+dwa+dskd_cma+dskd_v2+alm+mined+uld+multilevelot+gold+simct+xtoken_p+xtoken_h"
EVERYWHERE = {"dskd_cma": {"correct_only": False}, "dskd_v2": {"agreement": False}}
"""Random models are hardly ever right or of one mind; these settings compare all the same."""
WITHIN = {"mined.mined": 1e-4}
"""Mostly the corpus's own tokens: another teacher changes it by less than a hundredth."""


@pytest.fixture(scope="module")
def ready() -> Ready:
    torch.manual_seed(0)
    return set_up(tiny.tiny_cache().run(loss=LOSSES, losses=EVERYWHERE), "")


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return eager(tiny.tiny_cache().teacher)


@pytest.fixture(scope="module")
def stranger() -> PreTrainedModel:
    other = tiny.llama(tiny.TEACHER_TOKENIZER, seed=5, layers=4, width=32, tied=False)
    other.set_attn_implementation("eager")
    return other


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
        assert abs(value) > 1e-3 or ".unpaired@" in name or name == "multilevelot.left_out", (
            f"{name} is too small to be compared"
        )
        assert cached[name] == pytest.approx(value, rel=WITHIN.get(name, 0.01)), name


OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mta": ({"hid": "token", "student_pooling": "teacher", "span_weights": "entropy"}, {"mta.hid@2:word"}),
    "sra": ({"layers": [2, 3]}, {"sra.cos@2"}),
    "fdd": ({"layers": [1, 2, 4]}, {"fdd.trajectory", "fdd.final"}),
    "dskd": ({}, {"dskd.student_space", "dskd.teacher_space"}),
    "kl": ({}, {"kl.kl"}),
}
"""Losses that read layers or need one tokenizer: settings, and terms that another teacher changes."""


@pytest.mark.parametrize("loss", OTHERS)
def test_so_is_every_term_of_the_losses_that_read_layers_or_need_one_tokenizer(
    loss: str, teacher: PreTrainedModel, stranger: PreTrainedModel
) -> None:
    settings, changed = OTHERS[loss]
    ready, _ = one.ready(loss, **settings)

    cached, online = both_terms(ready, ROWS, teacher)
    _, others = both_terms(ready, ROWS, stranger)

    same_terms(cached, online)
    assert changed <= {name for name in cached if cached[name] != pytest.approx(others[name], rel=0.01)}
