"""Names and columns of the signals."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkd_schemas.errors import UsageError
from xkd_schemas.signals import KINDS, Signal, signal_named, teacher_schema
from xkd_schemas.tokens import TOKEN_FIELDS

signals = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: st.builds(
        Signal,
        st.just(name),
        st.integers(0, 200) if KINDS[name].layer else st.none(),
        st.sampled_from(("word", "phrase")) if KINDS[name].unit else st.none(),
        st.integers(1, 10**6) if KINDS[name].top else st.none(),
    )
)


@given(signals)
def test_a_column_name_says_the_whole_signal(signal: Signal) -> None:
    assert signal_named(signal.column) == signal


@pytest.mark.parametrize(
    "column",
    [
        "", "hidden", "hidden_last@3", "centrality", "centrality@", "centrality@x", "centrality@-1", "span_mass@3",
        "span_mass:word", "span_mass@3:token", "entropy:word", "entropy@1", " entropy", "entropy\n",
        "span_mass@3:word:word", "topk_ids", "topk_ids#", "topk_ids#0", "topk_ids#x", "entropy#4", "topk_ids@3#4",
    ],
)  # fmt: skip
def test_a_name_that_is_no_signal_is_refused_and_the_known_ones_listed(column: str) -> None:
    with pytest.raises(
        UsageError, match=r"is not known. Next: use one of: hidden_last, .*span_mass@LAYER:word\|:phrase"
    ):
        signal_named(column)


def test_the_columns_are_the_tokens_and_then_the_signals_once_each_in_sorted_order() -> None:
    wanted = [Signal("span_mass", 10, "word"), Signal("entropy"), Signal("span_mass", 9, "word"), Signal("entropy")]

    names = teacher_schema(wanted, 8).names

    assert names == [f.name for f in TOKEN_FIELDS] + ["entropy", "span_mass@10:word", "span_mass@9:word"]


def test_a_wide_signal_is_as_wide_as_the_teacher_and_says_how_it_is_coded() -> None:
    schema = teacher_schema([Signal("hidden_last"), Signal("span_geometry", 2, "word")], 576)
    hidden, geometry = schema.field("hidden_last"), schema.field("span_geometry@2:word")

    assert (hidden.type.value_type.list_size, hidden.type.value_type.value_type) == (576, pa.uint16())
    assert hidden.metadata == {b"codec": b"bf16", b"per": b"R"}
    assert geometry.type.value_type == pa.float16()
    assert geometry.metadata == {b"codec": b"float16", b"per": b"K(K-1)/2"}
