"""MTA: its equations against loops, and all its options on a cache."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import one_tokenizer as one
import slow_dskd
import slow_losses as slow
from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.mta import MtaSettings, needs, phi, strided_layers
from xkd_trainer.training.prepare import Ready

OPTIONS: tuple[dict[str, Any], ...] = (
    {"table": one.OTHER},
    {"hid": "token", "span_weights": "entropy"},
    {"hid": "token", "span_weights": "uniform", "spans_over": "response"},
    {"span_weights": "entropy"},
    {"hid": "token", "student_pooling": "teacher", "word_spans": "in_phrases"},
    {"student_pooling": "teacher", "student_layers": [2, 3, 3]},
    {"student_pooling": "uniform", "span_weights": "uniform"},
    {"word_spans": "in_phrases", "spans_over": "response"},
    {"dsa_vectors": "projected"},
    {"dsa_vectors": "projected", "hid": "off"},
)
KEYS = ["2:word", "3:phrase", "4:phrase"]
POOLS = {"teacher": "centrality", "uniform": "uniform"}


@pytest.mark.parametrize(
    ("depths", "num", "stride", "student", "teacher"),
    [
        ((12, 48), 3, 0, (6, 9, 12), (24, 36, 48)),
        ((24, 24), 6, 2, (14, 16, 18, 20, 22, 24), (14, 16, 18, 20, 22, 24)),
        ((24, 32), 5, 2, (16, 18, 20, 22, 24), (21, 24, 26, 29, 32)),
    ],
)
def test_strided_layers_are_those_of_the_papers_three_pairs(
    depths: tuple[int, int], num: int, stride: int, student: Any, teacher: Any
) -> None:
    picked = strided_layers(depths[0], num, stride)

    assert picked == student
    assert tuple(phi(layer, *depths) for layer in picked) == teacher


def weights_of(made: Ready, row: int, layer: int, how: str) -> list[float]:
    teacher = made.cache.teachers[row]
    targets, vocab = teacher["targets"].tolist(), made.cache.sizes.vocab_size
    if how == "centrality":
        return list(map(float, teacher[f"centrality@{layer}"]))
    if how == "uniform":
        return [1.0] * len(made.cache.students[row]["targets"])
    entropy = iter(teacher["entropy"].tolist())
    return [
        1 - next(entropy) / math.log(vocab) if t + 1 < len(targets) and targets[t + 1] else 0.0
        for t in range(len(targets))
    ]


def document(made: Ready, row: int, key: str, settings: dict[str, Any]) -> dict[str, Any]:
    layer, unit = int(key.split(":")[0]), key.split(":")[1]
    teacher, student, text = (t[row] for t in (made.cache.teachers, made.cache.students, made.cache.documents))
    how, own = settings.get("span_weights", "centrality"), settings.get("student_pooling", "own")
    beside = dict(zip(KEYS, settings.get("student_layers", [2, 3, 4]), strict=True))[key]
    states = one.states_of(made, row)[beside].tolist()
    targets, ranges = student["targets"].tolist(), student[f"{unit}_tokens"].tolist()
    phrases = [range(a, b) for a, b in text["phrases"].tolist()]
    central, wanted = teacher[f"span_mass@{key}"].tolist(), one.numbers(teacher[f"span_vectors@{key}"]).tolist()
    chosen, wide, masses = [], [], []
    for u, ((a, b), (x, y)) in enumerate(zip(ranges, text[f"{unit}s"].tolist(), strict=True)):
        in_phrase = any(p.start <= x and y <= p.stop for p in phrases)
        if b == a or (settings.get("word_spans") == "in_phrases" and unit == "word" and not in_phrase):
            continue
        if settings.get("spans_over") == "response" and not targets[a]:
            continue
        mass = {"uniform": 1.0, "centrality": central[u], "entropy": 0.0}[how]
        if how == "entropy" and targets[a]:
            mass = math.fsum(weights_of(made, row, layer, how)[a:b])
        if mass > 0:
            chosen.append((a, b))
            wide.append(wanted[u])
            masses.append(mass)
    pooling = slow.centrality(states) if own == "own" else weights_of(made, row, layer, POOLS[own])
    found = {"omega": slow.omega(masses, 1.0), "vectors": ([slow.pool(states, pooling, *s)[0] for s in chosen], wide)}
    if settings.get("hid") != "token":
        return found
    tokens, weights = sorted({t for a, b in chosen for t in range(a, b)}), weights_of(made, row, layer, how)
    theirs = one.numbers(teacher[f"hidden@{layer}"]).tolist()
    return found | {
        "tokens": ([states[t] for t in tokens], [theirs[t] for t in tokens]),
        "token omega": slow.omega([weights[t] for t in tokens], 1.0),
    }


@pytest.mark.parametrize("settings", OPTIONS)
@torch.no_grad()
def test_the_terms_are_the_loops_over_single_documents(settings: dict[str, Any]) -> None:
    made, batch = one.ready("mta", **settings)
    by_token = settings.get("hid") == "token"

    found = one.terms_of(made.distiller, batch)

    for key in KEYS:
        documents = [document(made, row, key, settings) for row in one.ROWS]
        projector = made.distiller.losses["mta"].projectors[key]
        weights = projector.weight.tolist(), projector.bias.tolist()
        sides = [d["vectors"] for d in documents]
        if settings.get("dsa_vectors"):
            sides = [(slow_dskd.linear(own, *weights), theirs) for own, theirs in sides]
        cosines = [[[[slow.cosine(u, v) for v in side] for u in side] for side in pair] for pair in sides]
        total, count = slow.dsa([(*pair, d["omega"]) for pair, d in zip(cosines, documents, strict=True)])
        one.assert_term(found[f"dsa@{key}"], total, count, rel=5e-3)
        spans = [len(d["omega"]) for d in documents if d["omega"]]
        one.assert_term(found[f"spans@{key}"], sum(spans), len(spans))
        if settings.get("hid") == "off":
            assert f"hid@{key}" not in found
            continue
        of, omega = ("tokens", "token omega") if by_token else ("vectors", "omega")
        compared = [(slow_dskd.linear(d[of][0], *weights), d[of][1], d[omega]) for d in documents]
        total, count = slow.hid(compared)
        assert count > 0
        one.assert_term(found[f"hid@{key}"], total, count)
    if by_token or settings.get("student_pooling") == "teacher":
        assert (float(found["same_tokens"].total), float(found["same_tokens"].count)) == (4.0, 4.0)


def test_dsa_is_averaged_over_levels_and_hid_too_unless_it_is_summed() -> None:
    """Eq. 10 and 14, and eq. 13 as printed."""
    given = {"lambda_dsa": 3.0, "lambda_hid": 0.6}
    mean, summed = (
        one.ready("mta", hid_layers=how, **given)[0].distiller.loss("mta").weights(0) for how in ("mean", "sum")
    )

    for found, hid in ((mean, 0.2), (summed, 0.6)):
        factors = {"dsa": 1, "hid": hid, "spans": 0, "unpaired": 0}
        assert found == pytest.approx({f"{t}@{k}": w for t, w in factors.items() for k in KEYS})


@pytest.mark.parametrize("settings", [{"hid": "token"}, {"student_pooling": "teacher"}])
def test_a_document_with_other_ids_is_left_out_and_counted(settings: dict[str, Any]) -> None:
    made, batch = one.ready("mta", **settings)
    ids_BT, valid_BT = batch.teacher_ids_BT.clone(), batch.teacher_valid_BT.clone()
    ids_BT[1, 2] += 1
    lengths = valid_BT.sum(1).tolist()
    longer = min((0, 2, 3), key=lengths.__getitem__)  # the teacher has a token more
    valid_BT[longer, lengths[longer]] = True

    def changed(batch: Batch) -> dict[str, float]:
        found = one.terms_of(made.distiller, batch)
        assert float(found["same_tokens"].count) == float(made.distiller.counts(batch)["mta.same_tokens"])
        return {name: float(t.total.detach()) for name, t in found.items()}

    found = changed(replace(batch, teacher_ids_BT=ids_BT, teacher_valid_BT=valid_BT))

    without = [one.only(batch, place) for place in {0, 2, 3} - {longer}]
    alone = [changed(b) for b in without]
    kind = "hid" if settings.get("hid") else "dsa"
    for key in KEYS:
        assert found[f"{kind}@{key}"] == pytest.approx(sum(a[f"{kind}@{key}"] for a in alone), rel=1e-5)
    assert found["same_tokens"] == 2.0


def test_a_student_that_reads_no_document_as_the_teacher_does_is_refused() -> None:
    for settings, instead in (
        ({"hid": "token"}, "losses.mta.hid=spans"), ({"student_pooling": "teacher"}, "losses.mta.student_pooling=own")
    ):  # fmt: skip
        with pytest.raises(UsageError, match=rf"needs one tokenizer on both sides.*Next: --set {instead}"):
            one.ready("mta", table=one.OTHER, **settings)
        with pytest.raises(UsageError, match=rf"none of the \d+ is: the two tables have other templates.*{instead}"):
            one.ready("mta", table=one.FRAMED, **settings)
    made, batch = one.ready("mta", table=one.FRAMED, span_weights="entropy")
    assert all(value > 0 for name, value in one.means(made, batch).items() if "unpaired" not in name)


def test_strided_picks_layers_by_phi_and_reads_no_other_level() -> None:
    made, batch = one.ready("mta", pick="strided")
    assert made.distiller.losses["mta"].student_layer == {"2:word": 2, "3:phrase": 3, "4:phrase": 4}
    made, batch = one.ready("mta", pick="strided", num_layers=2, stride=2)
    assert made.distiller.losses["mta"].student_layer == {"2:word": 2, "4:phrase": 4}
    assert sorted(one.terms_of(made.distiller, batch)) == [
        f"{term}@{level}" for term in ("dsa", "hid", "spans", "unpaired") for level in ("2:word", "4:phrase")
    ]
    made, _ = one.ready("mta", pick="strided", student_layers=[1, 2], depth=2)
    assert made.distiller.losses["mta"].student_layer == {"2:word": 1, "4:phrase": 2}
    assert made.distiller.loss("mta").layers == (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 4}, r"cache lacks 1:word, 2:phrase. Next: .* --word-layers 1 --phrase-layers 2,3,4"),
        ({"num_layers": 1}, r"beside 4:word of the teacher, and the cache lacks 4:word. Next: .*--word-layers 4"),
        ({"num_layers": 5}, r"5 layers do not fit a student of 4. Next: --set losses.mta.num_layers=N"),
        ({"student_layers": [5]}, r"layer 5 does not exist, the student has layers 1 to 4"),
        ({"student_layers": [2, 4, 4]}, r"stand beside teacher layers 2, 4, 4, one of them twice"),
    ],
)
def test_layers_that_cannot_be_picked_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one.ready("mta", pick="strided", **settings)


def test_needs_are_those_of_the_options() -> None:
    levels = Levels([(2, "word"), (4, "phrase")], num_layers=4, states=[])

    def columns(**settings: Any) -> set[str]:
        return {s.column for s in needs(MtaSettings(**settings), levels)} - {"span_mass@2:word", "span_mass@4:phrase"}

    geometry = {"span_geometry@2:word", "span_geometry@4:phrase"}
    assert columns(lambda_hid=0) == geometry
    assert columns(lambda_dsa=0) == {"span_vectors@2:word", "span_vectors@4:phrase"}
    assert columns(hid="token") == geometry | {"hidden@2", "hidden@4", "centrality@2", "centrality@4"}
    assert columns(hid="token", span_weights="uniform", lambda_dsa=0) == {"hidden@2", "hidden@4"}
    assert columns(hid="token", span_weights="entropy") == geometry | {"hidden@2", "hidden@4", "entropy"}
    assert columns(hid="token", lambda_hid=0) == geometry
    assert columns(student_pooling="teacher", hid="off") == geometry | {"centrality@2", "centrality@4"}


def test_the_projected_geometry_of_two_tokenizers_teaches_student_and_projector() -> None:
    """What the authors' code for two tokenizers compares: spans in the teacher's width, no Hid."""
    made, batch = one.ready("mta", table=one.OTHER, dsa_vectors="projected", hid="off")
    made.distiller(batch, made.distiller.counts(batch), 0)[0].backward()

    first = made.distiller.student.base_model.layers[0].mlp.up_proj
    taught = [first, *made.distiller.losses["mta"].projectors.values()]
    assert all(layer.weight.grad.any() for layer in taught)


def test_the_weights_that_pool_the_students_spans_are_constants() -> None:
    """MTA eq. 8 with w detached, as in the authors' code."""
    made, batch = one.ready("mta", table=one.OTHER)
    hidden_BSd = torch.randn(*batch.student_ids_BS.shape, 16, requires_grad=True)

    weights_BS = made.distiller.losses["mta"]._weigh_tokens(batch, batch.levels[0], hidden_BSd)

    assert not weights_BS.requires_grad
    torch.testing.assert_close(weights_BS.sum(1), torch.ones(len(one.ROWS)))
