"""What a run is built from: students, projectors and groups of parameters; what does not fit is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import one_tokenizer as one
import tiny_models as tiny
from xkd_pipeline.stages import align_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import UsageError
from xkd_trainer.training.prepare import set_up


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "mta=nan"}, "'mta=nan' is not NAME or NAME=NUMBER"),
        ({"loss": "mta=1+mta=2"}, "'mta=2' names a loss that is there before"),
        ({"loss": "sra", "losses": {"sra": {"taw": 3}}}, "losses.sra: 'taw' is not a setting. Next: did you mean"),
        ({"loss": "sra", "losses": {"sra": {"kd": "most"}}}, "losses.sra.kd: "),
        ({"loss": "ce", "losses": {"sra": {"taw": 3}}}, "losses.sra: 'taw' is not a setting"),
        ({"losses": {"ce": {"projector_lr": 1e-3}}}, "losses.ce.projector_lr: ce has no projectors here"),
        ({"loss": "sra", "losses": {"sra": {"projector_lr": -1}}}, "losses.sra.projector_lr: "),
        ({"loss": "sra", "losses": {"sra": {"projector_rate": 1}}}, "Next: did you mean 'projector_lr'?"),
        ({"losses": {"ce": {"skip": "student"}}}, "losses.ce.skip is student, and no row of "),
        ({"loss": "ce", "losses": {"sar": {}}}, "'sar' is not a loss"),
        ({"loss": "mta", "losses": {"mta": {"student_layers": [1]}}}, "mta.student_layers has 1 layers, the cache"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        set_up(tiny.tiny_cache().run(**changed), "")

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_student_layer_that_does_not_exist_is_refused_at_setup(layer: int) -> None:
    with pytest.raises(UsageError, match=f"layer {layer} does not exist, the student has layers 1 to 2"):
        one.ready("mta", depth=2, student_layers=[1, 2, layer])


def test_a_level_that_is_not_cached_is_named_with_the_command_that_adds_it(tmp_path: Path) -> None:
    shutil.copytree(tiny.tiny_cache().cache / "documents", tmp_path / "documents")
    captured_for_sra = tiny.tiny_cache().run(cache=str(tmp_path), teacher__losses=("sra",))
    for stage in (teacher_stage, align_stage):
        stage(captured_for_sra, Workers(count=0))
    run = tiny.tiny_cache().run(cache=str(tmp_path), loss="mta")

    with pytest.raises(UsageError, match=r"loss mta needs span_mass.*xkd-cache add CACHE --model M --for mta"):
        set_up(run, "")

    assert set_up(run.model_copy(update={"train": run.train.model_copy(update={"loss": "sra"})}), "").wanted


def test_a_student_with_fewer_embeddings_than_tokens_is_refused(tmp_path: Path) -> None:
    tiny.saved(tiny.llama("unigram"), "sentencepiece", tmp_path)

    run = tiny.tiny_cache().run(student__model=str(tmp_path))
    with pytest.raises(UsageError, match=r"has \d+ embeddings, its tokenizer \d+ tokens"):
        set_up(run, "")


def test_projectors_do_not_depend_on_how_the_student_was_made() -> None:
    def projector(**changed: Any) -> Tensor:
        return set_up(tiny.tiny_cache().run(loss="sra", **changed), "").distiller.losses["sra"].projector.weight

    tokenizer = str(tiny.tiny_cache().student)
    new = {"student__model": "new:llama,layers=1,width=16,heads=2", "student__tokenizer": tokenizer}
    assert torch.equal(projector(), projector(**new))
    assert torch.equal(projector(**new), projector(**new))
    assert not torch.equal(projector(), projector(seed=1))


def test_groups_decay_matrices_and_give_projectors_their_own_rate() -> None:
    made, _ = one.ready("dwa", table=one.OTHER)

    matrices, vectors, projectors = made.distiller.parameter_groups(lr=0.1, weight_decay=0.3)

    assert (matrices["lr"], matrices["weight_decay"]) == (0.1, 0.3)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.1, 0.0)
    assert (projectors["lr"], projectors["weight_decay"]) == (1e-3, 0.01)
    grouped = [p for group in (matrices, vectors, projectors) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in made.distiller.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})
    assert all(p.ndim < 2 for p in vectors["params"])
