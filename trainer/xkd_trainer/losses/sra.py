"""SRA, Span Representation Alignment (arXiv 2605.01205): pieces of text both models cut out, as centres of mass.

L = alpha L_CE + (1 - alpha) (cos L_cos + geo L_Geo + L_KD); alpha is 0.5, `--loss sra`.
L_cos pulls each projected student span vector to the teacher's, L_Geo compares the cosines between
span vectors, L_KD compares what the two heads predict from the span vectors, on the classes both
vocabularies have.

Shape legend: see batch.py; K any spans, d the student's width, V classes in both vocabularies.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xkd_schemas.errors import UsageError
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import (
    Context,
    Declaration,
    Levels,
    Loss,
    Positive,
    Projectors,
    Settings,
    StudentPass,
    Weight,
)
from xkd_trainer.losses.dual_space import TeacherHead
from xkd_trainer.losses.ops.divergence import Comparison
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.ops.shared_pass import head_divergence
from xkd_trainer.losses.ops.softmax_rows import slices
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.pairing import LayerIndex, compare_vectors, pair_layers, share_out
from xkd_trainer.models.measures import at_least_float32, centrality, divide, pool_spans, unit_vectors

BLOCK_PAIRS: Final = 1 << 20
"""Pairs of spans that `geometric` works at a time, 4 MB in float32."""


class SraSettings(Settings):
    """Options of SRA; every default is ours, and its docstring names what paper and code do."""

    spans: Literal["aligned", "word", "phrase"] = "aligned"
    """Pieces that are compared. aligned: between common ends of tokens (paper and code). word, phrase: linguistic
    spans of the response; phrases may overlap."""
    layers: tuple[LayerIndex, ...] = ()
    """Teacher layers that L_cos compares besides the last one, which is always among them. Paper: the last alone;
    later scripts: three, two apart. L_Geo and L_KD read the last."""
    student_layers: tuple[LayerIndex, ...] = ()
    """Student blocks, one for each of `layers` below the last, lowest first. Empty: those at the same depth."""
    beta: tuple[Weight, ...] = ()
    """Weight of each layer in L_cos, lowest first, the last one included; divided by their sum. Empty: all alike."""
    cos: Weight = 1.0
    """Weight of L_cos. First code: 1, the first author's later code: 2."""
    geo: Weight = 50.0
    """Weight of L_Geo. Code: 50; scripts for TinyLLaMA and OPT: 10."""
    tau: Positive = 2.0
    """Temperature of L_KD. Code: 2, and 4 for OPT. No tau squared in front, as in the code."""
    p: Weight = 1.0
    """Power of a span's mass in its loss weight. Code: 1. 0: every span alike."""
    weights: Literal["attention", "centrality", "uniform"] = "attention"
    """Token weights a_t of each layer. attention: what the last token attends to in that block, heads summed
    (paper). centrality: eq. 5-7 of MTA, arXiv 2605.01374, which needs no attention map.

    The code's first versions took the last row of the padded batch, and fell back to uniform
    without a word where the model gave no attention maps.
    """
    end_token: Literal["exclude", "include"] = "exclude"
    """exclude: a_t is the row of the last text token, and the two end tokens are no span; the authors' input has no
    end token. include: the row of the end token, which is a span, too."""
    kd: Literal["sum", "mean"] = "sum"
    """L_KD over the spans of a document. sum: the code, so it grows with the response. mean: does not."""
    weighted_pooling: bool = True
    """True: spans are pooled by token weights (the paper's WSP). False: plain mean of the tokens."""
    weighted_loss: bool = True
    """True: spans weigh in L_cos and L_Geo by the teacher's mass (the paper's WSL). False: all alike."""
    projector: Literal["xavier", "orthogonal"] = "xavier"
    """How W_l of L_cos begin. xavier: scripts with `--orthogonal False`. orthogonal: the code where nothing is said,
    as in its README; its rows or columns, whichever are fewer, are orthonormal."""
    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """Which classes count as shared, see `vocabulary.shared_vocabulary`. exact: equal strings (the code)."""


def layer_shares(beta: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights of `count` layers divided by their sum; all alike where none are given.

    UsageError where there are not as many as layers, or all are 0.
    """
    given = tuple(beta) or (1.0,) * count
    if len(given) != count or not sum(given) > 0:
        raise UsageError(
            f"sra.beta has {len(given)} weights, with sum {sum(given):g}, for {count} layers",
            fix="give one for each of sra.layers and one for the last layer, lowest first, not all 0",
        )
    return tuple(share / sum(given) for share in given)


def span_omega(mass_BK: Tensor, valid_BK: Tensor, p: float) -> Tensor:
    """Loss weight of each span, m_k^p over their sum in the document, [B, K], without gradient; 0 where not valid.

    All 0 for a document whose valid spans have no mass at all (unless p is 0): such a document adds 0 to its losses.

    >>> span_omega(torch.tensor([[0.2, 0.6, 0.2]]), torch.tensor([[True, True, False]]), 2.0)
    tensor([[0.1000, 0.9000, 0.0000]])
    """
    mass_BK = torch.where(valid_BK, at_least_float32(mass_BK), 0.0)
    if mass_BK.shape[-1]:  # so that a high power does not underflow
        mass_BK = divide(mass_BK, mass_BK.amax(-1, keepdim=True))
    return share_out(mass_BK**p, valid_BK)


def geometric(student_BKD: Tensor, teacher_BKD: Tensor, omega_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """L_Geo: sum_ij pi_ij (cos(C_i^S, C_j^S) - cos(C_i^T, C_j^T))^2 summed over documents.

    pi_ij = omega_i omega_j for i != j, divided by its sum in the document. A document with one valid span has no pair:
    it adds 0 to the total and is counted, as in the paper's 1/B; one without valid spans is not counted. Student
    vectors are not projected, the widths may differ. The teacher's vectors and omega are constants. Rows of pairs are
    worked a block at a time, and made again for the gradient.

    Two spans at right angles in the student, parallel in the teacher, differ by 1:

    >>> geometric(torch.eye(2)[None], torch.ones(1, 2, 4), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(1.), count=tensor(1.))
    """
    sides = [unit_vectors(torch.where(valid_BK.unsqueeze(-1), side, 0.0)) for side in (student_BKD, teacher_BKD)]
    omega_BK = torch.where(valid_BK, at_least_float32(omega_BK), 0.0)

    def work(student_BKD: Tensor, teacher_BKD: Tensor, rows: slice) -> Tensor:
        own_BRK, theirs_BRK = (side[:, rows] @ side.mT for side in (student_BKD, teacher_BKD))
        pi_BRK = omega_BK[:, rows, None] * omega_BK[:, None]
        pi_BRK.diagonal(rows.start, 1, 2).zero_()
        return torch.stack([pi_BRK * (own_BRK - theirs_BRK).square(), pi_BRK]).sum((-2, -1))

    sums_2B = omega_BK.new_zeros(2, len(omega_BK))
    for rows in slices(0, omega_BK.shape[1], max(1, BLOCK_PAIRS // max(1, omega_BK.numel()))):
        sums_2B = sums_2B + checkpoint(work, *sides, rows, use_reentrant=False, preserve_rng_state=False)
    return term(divide(*sums_2B).sum(), valid_BK.any(-1).sum())


# -- wiring to the cache


def needs(settings: SraSettings, levels: Levels) -> tuple[Signal, ...]:
    """States of the last and the chosen layers, what weighs them, and for words or phrases a level that has them."""
    inner, last = inner_layers(settings, levels.num_layers), levels.num_layers
    found = [Signal("hidden_last"), *(Signal("hidden", layer) for layer in inner)]
    if settings.weights == "attention" and settings.end_token == "include":
        found += [Signal("attention_last"), *(Signal("attention", layer) for layer in inner)]
    elif settings.weights != "uniform":
        name = "centrality" if settings.weights == "centrality" else "attention_text"
        found += [Signal(name, layer) for layer in (*inner, last)]
    if settings.spans == "aligned":
        return tuple(found)
    cached = [layer for layer, unit in levels if unit == settings.spans]
    if not cached:
        raise UsageError(
            f"sra.spans={settings.spans} needs span_mass of some teacher layer on {settings.spans}s, none is cached",
            fix="xkd-cache add CACHE --model M --for mta,sra",
        )
    return (*found, Signal("span_mass", cached[0], settings.spans))


def inner_layers(settings: SraSettings, last: int) -> tuple[int, ...]:
    """The chosen teacher layers below the last one, lowest first."""
    return tuple(sorted(layer for layer in settings.layers if layer != last))


Spans = tuple[Tensor, Tensor, Tensor]
"""Ranges of student tokens and of kept teacher rows, [B, K, 2], and which count, [B, K]."""


class Sra(Loss):
    """Terms `cos`, `geo` and `kd`; each is a mean over documents with an aligned span.

    With several layers, `cos@L` for each teacher layer L in place of `cos`. Beside them `spans`, without weight: how
    many spans such a document has.
    """

    def __init__(self, settings: SraSettings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.text_only = settings.end_token == "exclude"
        self.attention = settings.weights == "attention" and ("text" if self.text_only else True)
        self.last = last = context.teacher_layers
        inner = inner_layers(settings, last)
        if settings.student_layers and len(settings.student_layers) != len(inner):
            raise UsageError(
                f"sra.student_layers has {len(settings.student_layers)} layers, sra.layers has {len(inner)} below the "
                f"last ({last})"
            )
        ours = (*settings.student_layers, context.student_layers) if settings.student_layers else ()
        self.beside = dict(pair_layers("sra", (*inner, last), ours, context))
        self.layers = tuple(self.beside[layer] for layer in inner)
        shares = zip(self.beside, layer_shares(settings.beta, len(self.beside)), strict=True)
        cosines = {self._cos(layer): settings.cos * share for layer, share in shares}
        self.terms = cosines | {"geo": settings.geo, "kd": 1.0, "spans": 0.0}
        self.projector = _make_projector(context, settings)
        self.inner_projectors = nn.ModuleDict({str(layer): _make_projector(context, settings) for layer in inner})
        own_ids_V, their_ids_V = shared_vocabulary(context.student_vocab, context.teacher_vocab, settings.shared_vocab)
        self.student_ids_V = nn.Buffer(own_ids_V, persistent=False)
        self.head = TeacherHead(context, "sra", their_ids_V)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Documents with an aligned span."""
        return dict.fromkeys(self.terms, self._find_spans(batch)[2].any(-1).sum())

    def _cos(self, layer: int) -> str:
        return f"cos@{layer}" if self.layers else "cos"

    def _find_spans(self, batch: Batch) -> Spans:
        if self.settings.spans == "aligned":
            valid_BK = batch.span_valid_BK & batch.span_text_BK if self.text_only else batch.span_valid_BK
            return batch.span_student_BK2, batch.span_teacher_BK2, valid_BK
        level = next(level for level in batch.levels if level.unit == self.settings.spans)
        whole_BK = level.teacher_BU2[..., 1] > level.teacher_BU2[..., 0]
        return level.student_BU2, level.teacher_BU2, level.valid_BU & level.in_target_BU & whole_BK

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """The three terms of section 2.3, the first at every layer."""
        spans, terms = self._find_spans(batch), {}
        valid_BK, documents = spans[2], spans[2].any(-1).sum()
        for layer in self.beside:  # geo and kd read the vectors of the last
            student_BKd, teacher_BKD, omega_BK = self._pool(batch, student, spans, layer)
            projector = self.projector if layer == self.last else self.inner_projectors[str(layer)]
            total = compare_vectors(projector(student_BKd), teacher_BKD, omega_BK, valid_BK).total
            terms[self._cos(layer)] = term(total, documents)
        return terms | {
            "geo": geometric(student_BKd, teacher_BKD, omega_BK, valid_BK),
            "kd": term(self._kd(student, student_BKd, teacher_BKD, valid_BK), documents),
            "spans": term(valid_BK.sum().float(), documents),
        }

    def _pool(self, batch: Batch, student: StudentPass, spans: Spans, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Section 2.2 at one teacher layer: span vectors of both models, and loss weights."""
        student_BK2, teacher_BK2, valid_BK = spans
        if layer == self.last:
            hidden_BSd, teacher_BRD = student.states.last_BLD, unwrap(batch.teacher_hidden_BRD).float()
        else:
            hidden_BSd = student.states.layers[self.beside[layer]]
            teacher_BRD = _at_kept_rows(batch, batch.states(layer).hidden_BTD).float()
        teacher_BKD, mass_BK = pool_spans(teacher_BRD, self._weigh_teacher(batch, layer), teacher_BK2)
        if self.settings.weighted_pooling:
            student_BKd, _ = pool_spans(hidden_BSd, self._weigh_student(student, layer, hidden_BSd), student_BK2)
        else:
            student_BKd, _ = pool_spans(hidden_BSd, batch.student_valid_BS.float(), student_BK2)
            teacher_BKD, _ = pool_spans(teacher_BRD, batch.teacher_valid_BR.float(), teacher_BK2)
        mass_BK = mass_BK if self.settings.weighted_loss else valid_BK.float()
        return student_BKd, teacher_BKD, span_omega(mass_BK, valid_BK, self.settings.p)

    def _weigh_student(self, student: StudentPass, layer: int, hidden_BSd: Tensor) -> Tensor:
        valid_BS = student.batch.student_valid_BS
        if self.settings.weights == "uniform":
            return valid_BS.float()
        if self.settings.weights == "centrality":
            with torch.no_grad():
                return centrality(hidden_BSd, valid_BS)
        rows = student.states.text_layers if self.text_only else student.states.attention_layers
        return rows[self.beside[layer]]

    def _weigh_teacher(self, batch: Batch, layer: int) -> Tensor:
        """a_t of the teacher at the kept rows, [B, R]."""
        if self.settings.weights == "uniform":
            return batch.teacher_valid_BR.float()
        if self.settings.weights == "centrality":
            return _at_kept_rows(batch, batch.states(layer).centrality_BT)
        if self.text_only:
            return _at_kept_rows(batch, batch.states(layer).attention_text_BT)
        if layer == self.last:
            return unwrap(batch.teacher_attention_BR)
        return _at_kept_rows(batch, batch.states(layer).attention_BT)

    def _kd(self, student: StudentPass, student_BKd: Tensor, teacher_BKD: Tensor, valid_BK: Tensor) -> Tensor:
        """KL between what both heads make of the span vectors, on the shared classes (2.3c)."""
        shared = student.logits.of_classes(self.student_ids_V)
        weights_BK = valid_BK.float()
        if self.settings.kd == "mean":
            weights_BK = share_out(weights_BK, valid_BK)
        own = LazyLogits(hidden=student_BKd, weight=shared.weight, bias=shared.bias).at(valid_BK)
        how = Comparison(kind="forward_kl", temperature=self.settings.tau)
        return head_divergence(own, self.head(teacher_BKD).at(valid_BK), weights_BK[valid_BK], how)


def _make_projector(context: Context, settings: SraSettings) -> nn.Linear:
    projector = nn.Linear(context.student_width, context.teacher_width, bias=False)
    start = nn.init.orthogonal_ if settings.projector == "orthogonal" else nn.init.xavier_uniform_
    start(projector.weight)
    return projector


def _at_kept_rows(batch: Batch, values_BT: Tensor | None) -> Tensor:
    """What the cache has of all tokens, [B, T] or [B, T, D], at the kept rows."""
    kept_BR, values_BT = unwrap(batch.teacher_kept_BR), unwrap(values_BT)
    return gather_rows(values_BT, kept_BR) if values_BT.ndim == 3 else values_BT.gather(1, kept_BR)


SRA = Declaration(
    name="sra", source="SRA, arXiv 2605.01205, sections 2.1-2.3 of its method", settings=SraSettings, needs=needs,
    build=Sra, default_weight=0.5, ce_weight=0.5, projectors=Projectors(projector_lr=5e-4),
)  # fmt: skip
