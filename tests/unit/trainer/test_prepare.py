"""What a run is built from: losses and what they weigh, students, projectors, groups of parameters; refusals."""

import re
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
from xkd_trainer.losses.registry import LOSSES, formula, parse_loss
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
    with pytest.raises(UsageError, match=re.escape(message)):
        set_up(tiny.tiny_cache().run(**changed), "")


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


# What `--loss` weighs: the papers' totals, how they combine, and what a run says before it starts


PAPERS = {
    "ce": "1 ce", "kl": "1 kl", "rskd": "1 rskd", "fdd": "1 fdd", "mta": "1 ce + 1 mta", "sra": "0.5 ce + 0.5 sra",
    "dwa": "0.5 ce + 1 dwa", "dskd": "0.5 ce + 0.5 dskd", "dskd_cma": "0.5 ce + 0.5 dskd_cma",
    "dskd_cma_ga": "0.5 ce + 0.5 dskd_cma_ga",
    "dskd_v2": "0.5 ce + 0.5 dskd_v2", "alm": "0.5 ce + 0.5 alm", "mined": "0.5 ce + 0.5 mined",
    "uld": "0.5 ce + 0.5 uld", "multilevelot": "1 ce + 1.5 multilevelot", "gold": "1 gold",
    "simct": "1 simct",
    "xtoken_p": "1 ce + 1 xtoken_p", "xtoken_h": "1 ce + 1 xtoken_h",
}  # fmt: skip
TOGETHER = {
    "kl+mta": "1 kl + 1 mta",
    "fdd+mta": "1 fdd + 1 mta",
    "dskd_v2+mta": "0.5 ce + 0.5 dskd_v2 + 0.5 mta",
    "dwa+mta": "0.5 ce + 1 dwa + 0.5 mta",
    "mta+sra+dwa": "0.5 ce + 0.5 mta + 0.5 sra + 1 dwa",
    "multilevelot + sra": "1 ce + 1.5 multilevelot + 0.5 sra",
    "ce=0+sra": "0.5 sra",
    "ce+sra=2": "1 ce + 1 sra",
    "sra+mta=0.5": "0.5 ce + 0.5 sra + 0.25 mta",
    "ce=.25+mta=0": "0.25 ce",
}


@pytest.mark.parametrize(("loss", "total"), (PAPERS | TOGETHER).items())
def test_a_loss_is_the_papers_total_and_a_number_multiplies_its_part(loss: str, total: str) -> None:
    assert formula(parse_loss(loss)) == total


def test_every_loss_of_ours_is_in_that_table() -> None:
    assert set(PAPERS) == set(LOSSES)


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("mta=2,sra=1,dwa=0.5", "--loss mta+sra+dwa is 0.5 ce + 0.5 mta + 0.5 sra + 1 dwa; losses are joined by +"),
        ("ce=0.5,sra=0.5", "--loss sra is 0.5 ce + 0.5 sra; losses are joined by +"),
        ("mta,sra", "--loss mta+sra is 0.5 ce + 0.5 mta + 0.5 sra; losses"),
        ("sra=1", "--loss sra is 0.5 ce + 0.5 sra; --loss ce=1+sra=2 gives sra twice its weight beside 1 ce"),
    ],
)
def test_what_meant_something_else_before_is_refused_with_the_new_way(earlier: str, now: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--loss {earlier} is not written so any more. Next: {now}")):
        parse_loss(earlier)


@pytest.mark.parametrize("text", ["ce=0", "ce=0+sra=0"])
def test_losses_that_all_weigh_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--loss {re.escape(text)}: every loss weighs 0"):
        parse_loss(text)


def test_a_run_spells_out_what_every_term_weighs() -> None:
    run = tiny.tiny_cache().run(loss="sra+dwa=2", losses={"dwa": {"dtw_warmup_steps": 3}})
    distiller = set_up(run, "").distiller

    assert distiller.describe(9).startswith(
        "0.5 ce + 0.5 (sra.cos 1 + sra.geo 50 + sra.kd 1) + 2 (dwa.projected_ce 0.5 + "
    )
    assert re.search(r"dwa\.dtw_states [0-9.]+ to 0\.2\b", distiller.describe(9))
    assert distiller.term_weights(9)["dwa.dtw_states"] == 0.4
    assert {k: v for k, v in distiller.term_weights(9).items() if "dwa" not in k} == {
        "ce.ce": 0.5, "sra.cos": 0.5, "sra.geo": 25.0, "sra.kd": 0.5,
    }  # fmt: skip


def test_projectors_are_trained_as_their_paper_does_unless_the_run_or_the_loss_says_otherwise() -> None:
    def groups(projector_lr: float | None = None, **losses: dict[str, float]) -> dict[str, tuple[float, float]]:
        run = tiny.tiny_cache().run(loss="mta+sra+dwa", losses=losses, projector_lr=projector_lr)
        distiller = set_up(run, "").distiller
        matrices, vectors, *found = distiller.parameter_groups(lr=0.1, weight_decay=0.2)
        assert [(g["lr"], g["weight_decay"]) for g in (matrices, vectors)] == [(0.1, 0.2), (0.1, 0.0)]
        assert all(p.ndim < 2 for p in vectors["params"])
        grouped = [id(p) for group in (matrices, vectors, *found) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in distiller.parameters())
        assert [g["params"] for g in found] == [list(distiller.losses[n].parameters()) for n in ("mta", "sra", "dwa")]
        return {n: (g["lr"], g["weight_decay"]) for n, g in zip(("mta", "sra", "dwa"), found, strict=True)}

    assert groups() == {"mta": (5e-4, 0.01), "sra": (5e-4, 0.0), "dwa": (1e-3, 0.01)}
    assert groups(3e-3, sra={"projector_lr": 2e-3, "projector_weight_decay": 0.1}) == {
        "mta": (3e-3, 0.01), "sra": (2e-3, 0.1), "dwa": (3e-3, 0.01),
    }  # fmt: skip
