"""Teachers whose checkpoint says that it is quantised: what the plan records, what is refused, and what it costs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import small_cache
from rounding_quantizer import quantised
from small_cache import IN_PROCESS, made
from xkd_pipeline.maintain.recompute import recompute
from xkd_pipeline.reports.plan import make_plan, plan_lines
from xkd_pipeline.stages import teacher_stage
from xkd_pipeline.tables.writer import Outcome
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import BadData, InputMissing, Mismatch, Refused, UsageError
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.loading import load_model, quantization_of

ROUNDING = {"quant_method": "rounding", "steps": 7}


def captured(cache: Path, model: Path, **teacher: object) -> Outcome:
    shutil.copytree(made() / "cache" / "documents", cache / "documents")
    settings = {"model": str(model), "losses": ["kl"], **teacher}
    return teacher_stage(small_cache.run_file(cache, teacher=settings), IN_PROCESS)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small teacher rounded to 15 steps, and its cache."""
    folder = tmp_path_factory.mktemp("rounded")
    captured(folder / "cache", quantised(made() / "teacher", folder / "teacher", **ROUNDING))
    return folder


def test_the_plan_of_a_quantised_teacher_says_how_and_that_of_another_says_nothing(rounded: Path) -> None:
    run = small_cache.whole_run(rounded / "cache", teacher={"model": str(rounded / "teacher")})
    plan = make_plan(run, sample=4, budget=None, rate=None)

    assert Table(rounded / "cache", "teachers/T").manifest.spec["quantization"] == ROUNDING
    assert plan["model"]["quantization"] == ROUNDING
    assert plan["memory"]["weights"] == (rounded / "teacher/model.safetensors").stat().st_size
    assert any(line.startswith("quantised: rounding; what that costs") for line in plan_lines(plan))
    plain = make_plan(small_cache.whole_run(rounded / "cache"), sample=4, budget=None, rate=None)
    assert "quantization" not in {**plain["model"], **Table(made() / "cache", "teachers/T").manifest.spec}


def test_the_price_of_quantisation_is_that_of_both_models_run_by_hand(rounded: Path) -> None:
    ids = [torch.tensor(row["token_ids"].tolist())[None] for row in Table(rounded / "cache", "teachers/T")]
    rows = [torch.tensor(row["targets"].tolist()[1:]) for row in Table(rounded / "cache", "teachers/T")]
    found = []
    with torch.no_grad():
        for folder in (made() / "teacher", rounded / "teacher"):
            model = load_model(str(folder), dtype=torch.float32)
            states = [
                model.model(i).last_hidden_state[0, :-1][r].bfloat16().float() for i, r in zip(ids, rows, strict=True)
            ]
            found.append((torch.cat(states), head_of(model)(torch.cat(states)).log_softmax(-1)))
    (whole_ND, p_NV), (stored_ND, q_NV) = found
    kl = float((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean())

    price = recompute(rounded / "cache", "teachers/T", str(made() / "teacher"), 12).price

    assert price is not None
    assert kl > 0.001
    assert (price.method, price.predictions) == ("rounding", len(p_NV))
    assert price.kl_nats == pytest.approx(kl, rel=1e-3)
    error = float((stored_ND - whole_ND).norm() / whole_ND.norm())
    assert price.state_error == pytest.approx(error, rel=0.1)  # there are kept rows that predict nothing
    assert recompute(rounded / "cache", "teachers/T", str(rounded / "teacher"), 2).price is None

    code, said = small_cache.asked("verify", rounded / "cache", "--recompute", 2, "--model", made() / "teacher")
    assert (code, said["quantization"]["method"]) == (0, "rounding")


def test_the_price_is_refused_of_another_tokenizer_width_or_damaged_head(rounded: Path, tmp_path: Path) -> None:
    def priced(cache: Path, model: Path) -> None:
        recompute(cache, "teachers/T", str(model), 1)

    cache = Path(shutil.copytree(rounded / "cache", tmp_path / "cache"))
    other = small_cache.gpt2(tmp_path / "narrow")
    small_cache.student_tokenizer(tmp_path / "narrow")
    with pytest.raises(Mismatch, match="encoder"):
        priced(cache, other)
    wide = small_cache.llama(tmp_path / "wide", hidden_size=40)
    with pytest.raises(UsageError, match="is of a teacher with hidden_size 32, --model has 40"):
        priced(cache, wide)
    (cache / "teachers/T/head.safetensors").write_bytes(b"")
    with pytest.raises(BadData, match="does not match its digest"):
        priced(cache, made() / "teacher")
    captured(tmp_path / "thin", rounded / "teacher", losses=["rskd"])
    with pytest.raises(UsageError, match=r"holds no hidden_last.*--for kl"):
        priced(tmp_path / "thin", made() / "teacher")


def test_a_quantised_head_is_kept_as_plain_numbers_and_said_so(tmp_path: Path) -> None:
    model = quantised(made() / "teacher", tmp_path / "packed", **ROUNDING, packed=True)
    said = captured(tmp_path / "cache", model)

    assert "; quantised head kept as plain numbers" in said.line
    table = Table(tmp_path / "cache", "teachers/T")
    weight = load_model(str(model), dtype=torch.float32).lm_head.weight
    assert torch.equal(load_file(table.folder / "head.safetensors")["weight"].float(), weight.dequantize())


def test_a_head_that_cannot_be_read_back_is_refused() -> None:
    model = load_model(str(made() / "teacher"), dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(1000, 32, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(UsageError, match="the head of LlamaForCausalLM is quantised and cannot be read back"):
        head_of(model)


def test_pickled_weights_an_unknown_method_and_a_missing_package_are_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_torchao.is_torchao_available", lambda: False)
    unknown = quantised(made() / "teacher", tmp_path / "a", quant_method="sevenbit")
    missing = quantised(made() / "teacher", tmp_path / "b", quant_method="torchao", quant_type="int8_weight_only")

    pickled = quantised(made() / "teacher", tmp_path / "c", **ROUNDING)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")

    for model, kind, message in (
        (pickled, Refused, "no safetensors weights; pickled weights are not opened"),
        (unknown, UsageError, "is quantised by 'sevenbit', which this transformers does not know"),
        (missing, InputMissing, "torchao.* Next: install it, or use another model"),
    ):
        with pytest.raises(kind, match=message) as caught:
            captured(tmp_path / model.name / "cache", model)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / model.name / "cache/teachers").exists()
    assert quantization_of(str(made() / "teacher")) == {}
