"""What `--loss` weighs: the papers' totals, how they combine, and what a run says before it starts."""

import re

import pytest

import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_trainer.losses.registry import LOSSES, formula, parse_loss
from xkd_trainer.training.prepare import set_up

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
    with pytest.raises(UsageError) as caught:
        parse_loss(earlier)

    assert str(caught.value).startswith(f"--loss {earlier} is not written so any more. Next: {now}")


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
        found = distiller.parameter_groups(lr=0.1, weight_decay=0.2)[2:]
        assert [g["params"] for g in found] == [list(distiller.losses[n].parameters()) for n in ("mta", "sra", "dwa")]
        return {n: (g["lr"], g["weight_decay"]) for n, g in zip(("mta", "sra", "dwa"), found, strict=True)}

    assert groups() == {"mta": (5e-4, 0.01), "sra": (5e-4, 0.0), "dwa": (1e-3, 0.01)}
    assert groups(3e-3, sra={"projector_lr": 2e-3, "projector_weight_decay": 0.1}) == {
        "mta": (3e-3, 0.01), "sra": (2e-3, 0.1), "dwa": (3e-3, 0.01),
    }  # fmt: skip
