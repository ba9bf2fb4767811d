"""MinED: distances, maps and partners against the definitions, the carried logits, and the wired loss."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_chunks as slow
import slow_losses as tools
import tiny_models as tiny
from one_step import gradients
from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import Batch, blank
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.baselines.mined import (
    MINED,
    _nearest,
    carry_head,
    mined_divergence,
    partners,
    token_texts,
    usable_positions,
    vocabulary_map,
)
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.vocabulary import token_bytes
from xkd_trainer.losses.registry import LOSSES
from xkd_trainer.training.prepare import Ready, set_up

ROWS = (3, 19, 0, 11)
WORDS = st.text("abAé", max_size=6).map(lambda text: text.encode())
LONG = st.text("ab", min_size=55, max_size=75).map(lambda text: text.encode())


# Distances and the nearest string


@settings(max_examples=100, deadline=None)
@given(queries=st.lists(WORDS | LONG, max_size=5), texts=st.lists(WORDS | LONG, min_size=1, max_size=12))
def test_nearest_string_is_that_of_a_full_search(queries: list[bytes], texts: list[bytes]) -> None:
    found = _nearest(queries, {7 * n: text for n, text in enumerate(texts)})

    assert found.tolist() == [7 * slow.nearest(query, texts) for query in queries]


def slow_map(source: dict[str, int], target: dict[str, int]) -> dict[int, set[int]]:
    """The ids that may stand for each id: those of equal bytes, else of least distance without blanks."""
    own, other = token_bytes(source), token_bytes(target)
    found = {}
    for number, text in own.items():
        equal = {n for n, t in other.items() if t == text}
        distance = {n: slow.edit_distance(text.replace(b" ", b""), t.replace(b" ", b"")) for n, t in other.items()}
        found[number] = equal or {n for n, d in distance.items() if d == min(distance.values())}
    return found


@pytest.mark.parametrize(("source", "target"), [("byte_level", "sentencepiece"), ("unigram", "wordpiece")])
def test_vocabulary_map_takes_a_token_of_least_distance(source: str, target: str) -> None:
    whole, other = (tiny.tokenizer_of(kind).get_vocab() for kind in (source, target))
    some = {token: number for token, number in whole.items() if number % 5 == 0}
    few = {token: number for token, number in other.items() if number % 2 == 0}

    found, exact = vocabulary_map(some, few, "nearest"), vocabulary_map(some, few, "exact")

    wanted = slow_map(some, few)
    texts, others = token_bytes(some), token_bytes(few)
    for number in range(len(found)):
        if number not in wanted:
            assert found[number] == exact[number] == -1
        elif exact[number] < 0:
            assert int(found[number]) in wanted[number]
            assert all(texts[number].replace(b" ", b"") != text.replace(b" ", b"") for text in others.values())
        else:
            assert found[number] == exact[number]
            assert int(exact[number]) in wanted[number] or texts[number] == others[int(exact[number])]


def test_the_search_for_nearest_classes_is_counted_and_does_not_depend_on_its_pieces(monkeypatch, capsys) -> None:
    source, target = (
        {text: n for n, text in enumerate(texts)} for texts in (["aa", "abx", "cdd"], ["ab", "cd", "aa"])
    )
    whole = vocabulary_map(source, target, "nearest").tolist()
    monkeypatch.setattr("xkd_schemas.progress.EVERY", -1.0)  # every tick is shown
    monkeypatch.setattr("xkd_trainer.losses.baselines.mined.SEARCHED", 1)

    assert vocabulary_map(source, target, "nearest").tolist() == whole == [2, 0, 1]
    assert "mined: nearest classes: 1 of 2 classes" in capsys.readouterr().err


def test_a_vocabulary_maps_to_itself() -> None:
    vocabulary = tiny.tokenizer_of("sentencepiece").get_vocab()

    for mode in ("nearest", "exact"):
        found = vocabulary_map(vocabulary, vocabulary, mode)  # type: ignore[arg-type]
        assert found.tolist() == list(range(len(vocabulary)))


def test_a_token_of_text_is_taken_before_a_byte_token_and_a_blank_counts_only_where_it_is_equal() -> None:
    target = {"<0x41>": 0, "A": 1, "▁B": 2, "▁": 3, "C": 4, "▁C": 5}

    assert vocabulary_map({"A": 0, "ĠA": 1, "B": 2, "ĠC": 3, "C": 4}, target, "exact").tolist() == [1, 1, 2, 5, 4]


def test_vocabularies_that_share_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="share none"):
        vocabulary_map({"a": 0}, {"b": 0}, "nearest")


# Partners


TOKENS = st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"abc", b"bc", b"c"]), max_size=7)


@settings(max_examples=80, deadline=None)
@given(documents=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), fill=st.integers(0, 6))
def test_partners_are_those_of_the_walk_through_the_table(
    documents: list[tuple[list[bytes], list[bytes]]], fill: int
) -> None:
    strings = [b"", b"a", b"b", b"ab", b"abc", b"bc", b"c"]

    def side(which: int) -> Any:
        ids = [torch.tensor([strings.index(t) for t in pair[which]], dtype=torch.int64) for pair in documents]
        return strings, tools.padded(ids, fill, 8), tools.mask([*map(len, ids), 8])[:-1]

    found = partners(side(0), side(1))

    for row, (student, teacher) in enumerate(documents):
        assert found[row].tolist() == slow.partners(student, teacher) + [-1] * (8 - len(student))


def test_the_same_tokens_are_each_others_partners() -> None:
    ids, yes = torch.tensor([[2, 0, 1, 2, 2]]), torch.ones(1, 5, dtype=torch.bool)
    texts = token_texts({"Ġa": 0, "bc": 1, "de": 2})

    assert partners((texts, ids, yes), (texts, ids, yes)).tolist() == [[0, 1, 2, 3, 4]]


# The loss on logits


class Case:
    """Random states, heads, maps and masks, float64; `documents` are numbers of student predictions."""

    def __init__(self, seed: int, sizes: list[int], classes: int = 5, theirs: int = 4) -> None:
        g = tools.generator(seed)
        self.sizes, self.valid = sizes, tools.mask(sizes)
        self.student, self.teacher = tools.ragged(seed, sizes, 3), tools.ragged(seed + 1, sizes, 2)
        self.weight = torch.randn(classes, 3, generator=g, dtype=torch.float64)
        self.bias = torch.randn(classes, generator=g, dtype=torch.float64)
        self.head = torch.randn(theirs, 2, generator=g, dtype=torch.float64)
        self.head_bias = torch.randn(theirs, generator=g, dtype=torch.float64)
        self.to_teacher = torch.randint(-1, theirs, (classes - 1,), generator=g)
        self.to_teacher[0] = 0
        self.target = [torch.randint(0, classes, (n,), generator=g) for n in sizes]
        self.usable = [torch.rand(n, generator=g) < 0.6 for n in sizes]

    def loss(
        self, student: Tensor | None = None, fill: float = 0.0, rows: slice = slice(None), tau: float = 2.0
    ) -> Any:
        states = tools.padded(self.student, fill) if student is None else student
        head, logit = carry_head(self.head, self.head_bias, self.to_teacher, len(self.weight))
        return mined_divergence(
            LazyLogits(hidden=states[rows], weight=self.weight, bias=self.bias),
            LazyLogits(hidden=tools.padded(self.teacher, fill)[rows], weight=head, bias=logit),
            tools.padded(self.target, 1 if fill else 0)[rows],
            tools.padded(self.usable, bool(fill))[rows],  # type: ignore[arg-type]
            self.valid[rows],
            tau,
        )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tau=st.sampled_from([1.0, 2.0]))
def test_loss_equals_the_loops_over_positions(seed: int, tau: float) -> None:
    case = Case(seed, tools.lengths(seed))

    found = case.loss(tau=tau)

    positions = []
    for states, theirs, gold, usable in zip(case.student, case.teacher, case.target, case.usable, strict=True):
        own, other = (states @ case.weight.T + case.bias).tolist(), (theirs @ case.head.T + case.head_bias).tolist()
        positions += [
            (z, t if u else None, int(y)) for z, t, u, y in zip(own, other, usable.tolist(), gold, strict=True)
        ]
    total, count = slow.mined(positions, [*case.to_teacher.tolist(), -1], tau)
    assert float(found.total) == pytest.approx(total, rel=1e-8, abs=1e-9)
    assert float(found.count) == count


def test_loss_has_the_right_gradient_for_the_student_only() -> None:
    case = Case(1, [4, 3])
    teacher = [t.requires_grad_() for t in case.teacher]

    assert torch.autograd.gradcheck(lambda s: case.loss(s).total, tools.padded(case.student).requires_grad_())
    weight = case.weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda _w: case.loss().total, weight)
    assert all(t.grad is None for t in teacher)


def test_what_padding_holds_changes_no_bit() -> None:
    case = Case(2, [3, 0, 5, 1])

    def run(fill: float) -> tuple[Tensor, Tensor]:
        return tools.with_gradient(lambda s: case.loss(s, fill).total, tools.padded(case.student, fill))

    value, gradient = run(0.0)
    for fill in (1e9, math.nan, math.inf):
        tools.assert_same_bits(value, run(fill)[0])
        tools.assert_same_bits(gradient, run(fill)[1])
    assert (gradient[~case.valid] == 0).all()
    assert value > 0


def test_loss_does_not_depend_on_how_the_batch_is_cut() -> None:
    case = Case(3, [3, 1, 0, 5, 2])

    whole, parts = case.loss(), [case.loss(rows=r) for r in (slice(0, 2), slice(2, 3), slice(3, 5))]

    torch.testing.assert_close(whole.total, sum(p.total for p in parts))
    assert whole.count == sum(p.count for p in parts) == 11


@pytest.mark.parametrize("sizes", [[0], [1], [1, 0]])
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_degenerate_input_is_finite(sizes: list[int], size: float) -> None:
    case = Case(4, sizes)

    value, gradient = tools.with_gradient(lambda s: case.loss(s).total, tools.padded(case.student) * size)

    assert value.isfinite()
    assert gradient.isfinite().all()


def test_a_teacher_that_is_its_own_student_costs_nothing() -> None:
    case = Case(5, [4, 2])
    head, logit = carry_head(case.weight, case.bias, torch.arange(5), 5)
    states = tools.padded(case.student)

    def loss(student: Tensor) -> Tensor:
        own = LazyLogits(hidden=student, weight=case.weight, bias=case.bias)
        other = LazyLogits(hidden=states, weight=head, bias=logit)
        return mined_divergence(own, other, torch.zeros(2, 4).long(), case.valid, case.valid, 2.0).total

    value, gradient = tools.with_gradient(loss, states)

    assert abs(value) < 1e-12
    assert gradient.abs().max() < 1e-12


def test_a_position_is_usable_only_where_the_partner_reads_the_same_token() -> None:
    found = usable_positions(
        torch.tensor([[0, 1, -1]]), torch.tensor([[7, 8, 7]]), torch.tensor([[1, 2]]), torch.tensor([0, 7, 9])
    )

    assert found.tolist() == [[True, False, False]]


# The wired loss


def ready(**changed: Any) -> tuple[Ready, Batch]:
    made = set_up(tiny.tiny_cache().run(loss="ce=0+mined=2", losses={"mined": changed}), "")
    return made, batch_of(made.cache, ROWS, made.wanted)


def test_it_is_registered_and_asks_for_the_last_states_only() -> None:
    made, _ = ready()

    assert LOSSES["mined"] is MINED
    assert {s.name for s in made.wanted} == {"hidden_last"}
    assert list(made.distiller.losses.parameters()) == []


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", ["inverse", "nearest"])
def test_the_wired_loss_is_the_loops_over_single_documents(vocabulary: str) -> None:
    made, batch = ready(vocabulary=vocabulary)
    head = made.cache.head().weight_VD.float()
    own, theirs = (tiny.tokenizer_of(kind).get_vocab() for kind in ("sentencepiece", "byte_level"))
    to_teacher = vocabulary_map(own, theirs, "nearest").tolist()
    to_student = vocabulary_map(theirs, own, "nearest").tolist()
    if vocabulary == "inverse":
        to_teacher = [to_student.index(n) if n in to_student else -1 for n in range(len(to_teacher))]
        assert len({t for t in to_teacher if t >= 0}) == sum(t >= 0 for t in to_teacher)
    s_bytes, t_bytes = ({n: b.replace(b" ", b"") for n, b in token_bytes(v).items()} for v in (own, theirs))
    positions, matched = [], 0
    for row in ROWS:
        teacher, student = made.cache.teachers[row], made.cache.students[row]
        ids, t_ids = student["token_ids"].tolist(), teacher["token_ids"].tolist()
        logits = made.distiller.student(input_ids=torch.tensor([ids])).logits[0].tolist()
        hidden = (torch.from_numpy(teacher["hidden_last"].astype("int32")) << 16).view(torch.float32)
        t = teacher["targets"]
        kept = [p for p in range(len(t)) if t[p] or (p + 1 < len(t) and t[p + 1])]
        predict = [p - 1 for p in range(1, len(ids)) if student["targets"][p]]
        t_predict = [p - 1 for p in range(1, len(t_ids)) if t[p]]
        found = slow.partners([s_bytes[ids[p]] for p in predict], [t_bytes[t_ids[p]] for p in t_predict])
        for p, partner in zip(predict, found, strict=True):
            usable = partner >= 0 and to_student[t_ids[t_predict[partner]]] == ids[p]
            rows = (hidden[kept.index(t_predict[partner])] @ head.T).tolist() if usable else None
            positions.append((logits[p], rows, ids[p + 1]))
            matched += usable

    loss, parts = made.distiller(batch, made.distiller.counts(batch), 0)

    total, count = slow.mined(positions, to_teacher, 2.0)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)
    assert float(parts["mined.matched"]) == pytest.approx(matched / count)
    assert 0 < matched < count


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up(size: int) -> None:
    made, whole = ready()
    cut = [batch_of(made.cache, ROWS[n : n + size], made.wanted) for n in range(0, len(ROWS), size)]
    counts = made.distiller.counts(whole)

    expected, one = gradients(made.distiller, [whole], counts)
    found, many = gradients(made.distiller, cut, counts)

    assert found == pytest.approx(expected, rel=1e-5)
    for name, slope in one.items():
        torch.testing.assert_close(many[name], slope, rtol=1e-4, atol=1e-5, msg=name)
    assert one["student.model.embed_tokens.weight"].abs().sum() > 0


def test_padding_and_a_blank_batch_change_and_add_nothing() -> None:
    made, batch = ready()
    counts = made.distiller.counts(batch)
    m, n = batch.teacher_predict_valid_BM, batch.predict_valid_BN
    assert not m.all()
    assert batch.teacher_hidden_BRD is not None
    dirty = replace(
        batch,
        student_ids_BS=batch.student_ids_BS.masked_fill(~batch.student_valid_BS, 77),
        predict_BN=batch.predict_BN.masked_fill(~n, 2),
        target_BN=batch.target_BN.masked_fill(~n, 55),
        teacher_predict_BM=batch.teacher_predict_BM.masked_fill(~m, 1),
        teacher_input_BM=batch.teacher_input_BM.masked_fill(~m, 44),
        teacher_hidden_BRD=batch.teacher_hidden_BRD.masked_fill(~batch.teacher_valid_BR[..., None], math.nan),
    )

    value, slopes = gradients(made.distiller, [batch], counts)
    other, others = gradients(made.distiller, [dirty], counts)
    nothing, zeros = gradients(made.distiller, [blank(batch)], counts)

    assert other == value > 0
    assert all(torch.equal(slope, others[name]) for name, slope in slopes.items())
    assert nothing == 0.0
    assert all(float(slope.abs().max()) == 0.0 for slope in zeros.values())


@pytest.mark.parametrize("changed", [{"temperature": 1.0}, {"vocabulary": "exact"}])
@torch.no_grad()
def test_every_setting_changes_something(changed: dict[str, Any]) -> None:
    (made, batch), (other, _) = ready(**changed), ready()

    values = [float(d(batch, d.counts(batch), 0)[0]) for d in (made.distiller, other.distiller)]

    assert values[0] != pytest.approx(values[1], rel=1e-4)
    assert all(math.isfinite(v) for v in values)


def test_a_few_steps_bring_the_student_nearer() -> None:
    made, batch = ready()
    optimizer = torch.optim.AdamW(made.distiller.parameters(), lr=0.01)
    counts, losses = made.distiller.counts(batch), []

    for step in range(8):
        loss, _ = made.distiller(batch, counts, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.9 * losses[0]


def test_without_rapidfuzz_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkd_trainer.losses.baselines.mined.importlib.util.find_spec", lambda _name: None)

    with pytest.raises(UsageError, match="mined needs rapidfuzz"):
        ready()
