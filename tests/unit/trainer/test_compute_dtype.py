"""The dtype of a model: what the hardware says and what it does, on hardware that is made up."""

import re

import pytest
import torch

from fake_hardware import hardware_is
from xkd_schemas.errors import UsageError
from xkd_trainer.models import compute_dtype
from xkd_trainer.models.compute_dtype import choose_dtype, dtype_named


@pytest.mark.parametrize(
    ("has_bfloat16", "factor", "dtype", "why"),
    [
        (True, 0.5, "bfloat16", "because CPU AVX2 has bfloat16 instructions; .* take 0.5 times as long as float32"),
        (True, 60.0, "float32", "because on CPU AVX2 bfloat16 products take 60 times as long"),
        (False, 63.4, "float32", "because CPU AVX2 has no bfloat16 instructions; .* take 63 times as long"),
        (False, 107.4, "float32", "bfloat16 products take 107 times as long as float32"),
        (False, 1.0, "float32", "has no bfloat16 instructions"),
    ],
)
def test_auto_is_bfloat16_only_where_the_flags_say_so_and_a_product_confirms_it(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, factor: float, dtype: str, why: str
) -> None:
    hardware_is(monkeypatch, has_bfloat16=has_bfloat16, factor=factor)

    choice = choose_dtype("auto", "cpu")

    assert (choice.dtype, choice.warning) == (dtype, "")
    assert re.search(why, choice.line)


@pytest.mark.parametrize("asked", ["bfloat16", "bf16"])
def test_a_slow_dtype_is_obeyed_with_one_warning_that_names_the_measured_factor(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    processor = hardware_is(monkeypatch, has_bfloat16=False, factor=63.4)

    choice = choose_dtype(asked, "cpu")

    assert (choice.dtype, choice.why, processor.timed) == ("bfloat16", "as asked for", ["bfloat16"])
    assert choice.warning == "bfloat16 products take 63 times as long as float32 here (CPU AVX2)"
    assert choose_dtype("fp32", "cpu").warning == ""
    hardware_is(monkeypatch, has_bfloat16=True, factor=0.6)
    assert choose_dtype(asked, "cpu").warning == ""


def test_short_names_are_other_names_and_unknown_ones_are_refused_with_the_known() -> None:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "float32": torch.float32}
    assert {name: dtype_named(name) for name in names} == names
    with pytest.raises(UsageError, match=r"dtype 'int8' is not known.*bfloat16, float16, float32"):
        choose_dtype("int8", "cpu")


def test_the_processor_at_hand_is_asked_and_timed_and_a_gpu_that_is_not_here_gets_bfloat16() -> None:
    here = compute_dtype.hardware("cpu")
    assert here.kind.startswith("CPU ")
    assert here.slowdown("bfloat16") == here.slowdown("bfloat16") > 0
    if not torch.cuda.is_available():
        assert choose_dtype("auto", "cuda").dtype == "bfloat16"
