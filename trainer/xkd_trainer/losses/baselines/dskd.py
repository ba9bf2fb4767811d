"""DSKD (arXiv 2406.17328), DSKD-CMA-GA (2603.22056) and DSKDv2 (2504.11426); see `dual_space` for their three terms.

`dskd` compares by position, for one tokenizer, `dskd_cma` by cross-model attention, for two. `dskd_v2` compares where
both models predict the same piece of text. There the projection from teacher to student starts where the student's
head gives the teacher's logits on the classes both vocabularies share; the one from student to teacher is never
trained but solved anew from the student's current head.

`dskd_cma_ga` is `dskd_cma` whose queries learn to look like its keys. Queries are made of the student's embeddings and
keys of the teacher's, two distributions that need not meet. A discriminator D learns to tell them apart, and the
projector of the queries learns to deceive it, beside the three terms. Both learn in one step: the gradient of D's loss
reaches the queries with its sign turned.

    z = sigmoid(H x) relu(H x) + (1 - sigmoid(H x)) x        D(x) = w leaky_relu(W z), slope 0.1; each with bias
    keys     sum_j -log sigmoid(D(k_j)) / M                  teaches D
    queries  sum_i -log(1 - sigmoid(D(q_i))) / N             teaches D, and `query` with the sign turned

Shape legend: see batch.py; d is the student's width, K counts the classes both vocabularies share, and of the
discriminator is the width of the common space, 2 D; P tokens of one kind, response only. In the functions
    D width of one model    W width of the other    V teacher's vocabulary
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear, softplus

from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Positive, Projectors, StudentPass, constant_head
from xkd_trainer.losses.dual_space import (
    SPACES,
    CrossModelLoss,
    DualSpaceSettings,
    Mixed,
    TeacherHead,
    teacher_states,
    with_fixed_head,
)
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked
from xkd_trainer.losses.ops.shared_pass import head_cross_entropy, head_divergence
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.losses.pairing import OneTokenizerLoss

RANK_TOLERANCE = 1e-6  # singular values below this share of the largest count as 0 in `pseudo_inverse`


class DskdCmaSettings(DualSpaceSettings):
    """Options of DSKD with cross-model attention."""

    correct_only: bool = True
    """Compare in the student's space only where the projected teacher predicts the text's next token (the code)."""


class DskdGaSettings(DskdCmaSettings):
    """Options of the adversary beside those of DSKD-CMA."""

    kq_rate: Positive = 0.01
    """What `keys` and `queries` weigh beside the three terms. The code's default; without it: dskd_cma."""
    hidden: int = Field(default=768, ge=1)
    """Inner width of the discriminator. The code's 768."""


class DskdV2Settings(DualSpaceSettings):
    """Options of DSKDv2. Its code compares with one divergence in both spaces: set both to have another one."""

    agreement: bool = True
    """Compare in the student's space only where the projected teacher predicts the teacher's own label (the code)."""
    t2s_agreement: float = Field(default=1.0, ge=0, le=1)
    """A document where a larger share of labelled pairs agrees is compared at all of them. Code: 1, over a batch."""
    spaces: Literal["both", "student", "teacher"] = "both"
    """student: without `teacher_space` (the code's only_stu_kd). teacher: that term alone (only_tea_kd)."""
    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """mapped: classes are the same if their bytes are, whatever mark the vocabulary writes for a blank (the code maps
    the two common marks). exact: equal token strings."""


def find_correct(projected: LazyLogits, target_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Where the likeliest class of the projected teacher is the target: DSKD-CMA's mask, bool [B, N].

    Invalid positions are not read. Of equal logits the first class counts.
    """
    best_N = chunked(lambda _, logits_CV: logits_CV.argmax(-1), projected.detach().at(valid_BN))
    return valid_BN.masked_scatter(valid_BN, best_N == target_BN[valid_BN])


def pseudo_inverse(head_KD: Tensor) -> Tensor:
    """Moore-Penrose inverse [D, K] of a tall matrix, from the eigenvectors of its D x D Gram matrix in float64.

    Faster than a singular value decomposition and without its factor of K rows; as exact while the condition number
    is well below 1 / RANK_TOLERANCE, as that of a head is. Float32, or float64 if the input is; without gradient.

    >>> pseudo_inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    tensor([[0.5000, 0.0000, 0.0000],
            [0.0000, 0.2500, 0.0000]])
    """
    wide_KD = head_KD.detach().double()
    gram_DD = wide_KD.T @ wide_KD
    inverse_DK: Tensor = torch.linalg.pinv(gram_DD, rtol=RANK_TOLERANCE**2, hermitian=True) @ wide_KD.T
    return inverse_DK.to(torch.float64 if head_KD.dtype == torch.float64 else torch.float32)


def equal_logits(inverse_DK: Tensor, other_KW: Tensor) -> Tensor:
    """The linear map from one model's states to another's under which its head gives the first one's logits, [D, W].

    With states h of width W read by `other`, and a head of which `inverse` is the pseudo-inverse, h' = M h is the
    least-squares solution of head h' = other h on the K shared classes, for every h. Both projections of DSKDv2 are
    it: from teacher to student with the student's inverse (the start of training), and back with the teacher's.
    """
    return inverse_DK @ other_KW.detach().to(inverse_DK.dtype)


def turn_gradient(x: Tensor) -> Tensor:
    """The same values; what is behind them gets the gradient with its sign turned.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> turn_gradient(x).square().backward()
    >>> x.grad
    tensor(-6.)
    """
    return 2.0 * x.detach() - x


class Discriminator(nn.Module):
    """Logits that vectors are keys, [P, K] to [P]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.highway = nn.Linear(width, width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, x_PK: Tensor) -> Tensor:
        """D of the module's first lines."""
        open_PK = self.highway(x_PK)
        gate_PK = open_PK.sigmoid()
        mixed_PK = gate_PK * open_PK.relu() + (1.0 - gate_PK) * x_PK
        logits_P1: Tensor = self.outer(leaky_relu(self.inner(mixed_PK), 0.1))
        return logits_P1[:, 0]


# -- wiring to the cache


class Dskd(OneTokenizerLoss):
    """The three terms; prediction n of both models is the same token's."""

    terms = SPACES

    def __init__(self, settings: DualSpaceSettings, context: Context) -> None:
        super().__init__("dskd", context)
        self.settings = settings
        self.t2s = nn.Linear(context.teacher_width, context.student_width)
        self.s2t = nn.Linear(context.student_width, context.teacher_width)
        self.head = TeacherHead(context, "dskd")

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces, with every prediction weighing the same."""
        valid_BN, s, count = batch.predict_valid_BN, self.settings, batch.num_predictions
        hidden_ND, own = teacher_states(batch)[valid_BN], student.logits.at(valid_BN)
        projected = with_fixed_head(student, self.t2s(hidden_ND))
        back, theirs = self.head(self.s2t(own.hidden)), self.head(hidden_ND)
        return {
            "projected_ce": term(head_cross_entropy(projected, batch.target_BN[valid_BN]), count),
            "student_space": term(head_divergence(own, projected, None, s.student_space), count),
            "teacher_space": term(head_divergence(back, theirs, None, s.teacher_space), count),
        }


class DskdCma(CrossModelLoss):
    """The same three terms between two tokenizers; each token takes a mixture of the other model's states."""

    terms: tuple[str, ...] | Mapping[str, float] = SPACES

    def __init__(self, settings: DskdCmaSettings, context: Context, who: str = "dskd_cma") -> None:
        super().__init__(context, who)
        self.settings = settings

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces."""
        return self.compare(batch, student, self.mix(batch, student))

    def compare(self, batch: Batch, student: StudentPass, mixed: Mixed) -> Mapping[str, LossTerm]:
        """The three terms; in the student's space only where the projected teacher is right, if so set."""
        valid_BN, valid_BM, projected = batch.predict_valid_BN, batch.teacher_predict_valid_BM, mixed.projected
        kept_BN = find_correct(projected, batch.target_BN, valid_BN) if self.settings.correct_only else valid_BN
        own, back, theirs = student.logits.at(kept_BN), mixed.back.at(valid_BM), self.head(mixed.hidden_BMD[valid_BM])
        totals = (
            head_cross_entropy(projected.at(valid_BN), batch.target_BN[valid_BN]),
            head_divergence(own, projected.at(kept_BN), None, self.settings.student_space),
            head_divergence(back, theirs, None, self.settings.teacher_space),
        )
        return {name: term(total, batch.num_predictions) for name, total in zip(SPACES, totals, strict=True)}


class DskdGa(DskdCma):
    """The terms of DSKD-CMA, and what the discriminator makes of `keys` and `queries`, a mean over each."""

    def __init__(self, settings: DskdGaSettings, context: Context) -> None:
        super().__init__(settings, context, "dskd_cma_ga")
        self.terms = dict.fromkeys(SPACES, 1.0) | dict.fromkeys(("keys", "queries"), settings.kq_rate)
        self.discriminator = Discriminator(2 * context.teacher_width, settings.hidden)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """The student's response tokens, and the teacher's for the keys."""
        return {**super().counts(batch), "keys": batch.teacher_predict_valid_BM.sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces and the adversary."""
        mixed, counts = self.mix(batch, student), self.counts(batch)
        of_keys = self.discriminator(mixed.key_BMK[batch.teacher_predict_valid_BM])
        of_queries = self.discriminator(turn_gradient(mixed.query_BNK[batch.predict_valid_BN]))
        return {
            **self.compare(batch, student, mixed),
            "keys": term(softplus(-of_keys).sum(), counts["keys"]),
            "queries": term(softplus(of_queries).sum(), counts["queries"]),
        }


class DskdV2(Loss):
    """`projected_ce` over labelled pairs, `student_space` over those that agree, `teacher_space` over all pairs.

    A pair is labelled where the teacher's likeliest class is in the student's vocabulary. Each term is a mean over its
    pairs. Which agree is found before the step, with one more product of the student's head.
    """

    def __init__(self, settings: DskdV2Settings, context: Context) -> None:
        super().__init__()
        self.settings = settings
        self.student_head = context.student_head
        self.head = TeacherHead(context, "dskd_v2")
        own_ids_K, their_ids_K = shared_vocabulary(context.student_vocab, context.teacher_vocab, settings.shared_vocab)
        student_KD = constant_head(context.student_head(), "this student").weight_VD[own_ids_K]
        teacher_KD = self.head.weight_VD[their_ids_K]
        self.t2s = nn.Linear(context.teacher_width, context.student_width, bias=False)
        with torch.no_grad():
            self.t2s.weight = nn.Parameter(equal_logits(pseudo_inverse(student_KD), teacher_KD).float())
        labels_V = torch.full((len(self.head.weight_VD),), -1, dtype=torch.int64)
        labels_V[their_ids_K] = own_ids_K
        self.labels_V = nn.Buffer(labels_V, persistent=False)
        """For each teacher class the student class of the same text, or -1."""
        self.student_ids_K = nn.Buffer(own_ids_K, persistent=False)
        self.inverse_DK = nn.Buffer(pseudo_inverse(teacher_KD), persistent=False)
        student, teacher = (float(settings.spaces != other) for other in ("teacher", "student"))
        self.terms = {"projected_ce": student, "student_space": student, "teacher_space": teacher}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Labelled pairs, those that agree, and all pairs."""
        label_BE, labelled_BE = self._find_labels(batch)
        kept_BE = labelled_BE
        if self.settings.agreement and self.settings.spaces != "teacher":
            head = constant_head(self.student_head(), "this student", convert=False)
            with torch.no_grad():
                hidden_BEd = self.t2s(gather_rows(teacher_states(batch), batch.pairs_BE2[..., 1]))
                projected = LazyLogits(hidden=hidden_BEd, weight=head.weight_VD, bias=head.bias_V)
                kept_BE = self._choose(projected, label_BE, labelled_BE)
        return dict(zip(SPACES, (labelled_BE.sum(), kept_BE.sum(), batch.pair_valid_BE.sum()), strict=True))

    def _choose(self, projected: LazyLogits, label_BE: Tensor, labelled_BE: Tensor) -> Tensor:
        if not self.settings.agreement:
            return labelled_BE
        agreeing_BE = find_correct(projected, label_BE, labelled_BE)
        share_B1 = agreeing_BE.sum(-1, keepdim=True) / labelled_BE.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(share_B1 > self.settings.t2s_agreement, labelled_BE, agreeing_BE)

    def _find_labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest class of each pair as a student class, and where there is one, [B, E] both."""
        label_BE = self.labels_V[unwrap(batch.teacher_argmax_BM).gather(1, batch.pairs_BE2[..., 1])]
        return label_BE, batch.pair_valid_BE & (label_BE >= 0)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces, over pairs."""
        s, paired_BE, (label_BE, labelled_BE) = self.settings, batch.pair_valid_BE, self._find_labels(batch)
        own = replace(student.logits, hidden=gather_rows(student.predict_hidden_BNd, batch.pairs_BE2[..., 0]))
        teacher_BED = gather_rows(teacher_states(batch), batch.pairs_BE2[..., 1])
        projected = with_fixed_head(student, self.t2s(teacher_BED))
        kept_BE = self._choose(projected, label_BE, labelled_BE)
        s2t_Dd = equal_logits(self.inverse_DK, own.weight[self.student_ids_K])
        back, theirs = self.head(linear(own.hidden[paired_BE], s2t_Dd)), self.head(teacher_BED[paired_BE])
        sums = (
            head_cross_entropy(projected.at(labelled_BE), label_BE[labelled_BE]),
            head_divergence(own.at(kept_BE), projected.at(kept_BE), None, s.student_space),
            head_divergence(back, theirs, None, s.teacher_space),
        )
        counts = (labelled_BE.sum(), kept_BE.sum(), paired_BE.sum())
        return {name: term(*both) for name, *both in zip(SPACES, sums, counts, strict=True)}


DSKD = Declaration(
    name="dskd", source="DSKD for one vocabulary, arXiv 2406.17328", settings=DualSpaceSettings, build=Dskd,
    one_tokenizer=True, default_weight=0.5, ce_weight=0.5,
    projectors=Projectors(projector_lr=1e-3, projector_weight_decay=0.01),
)  # fmt: skip
DSKD_CMA = replace(
    DSKD, name="dskd_cma", source="DSKD with cross-model attention, arXiv 2406.17328", settings=DskdCmaSettings,
    build=DskdCma, one_tokenizer=False,
)  # fmt: skip
DSKD_CMA_GA = replace(
    DSKD_CMA, name="dskd_cma_ga", source="DSKD-CMA with key-query matching by an adversary, arXiv 2603.22056",
    settings=DskdGaSettings, build=DskdGa,
)  # fmt: skip
DSKD_V2 = replace(
    DSKD_CMA, name="dskd_v2", source="DSKDv2 with exact token alignment, arXiv 2504.11426", settings=DskdV2Settings,
    needs=lambda _settings, _levels: (Signal("hidden_last"), Signal("argmax")), build=DskdV2,
    projectors=Projectors(projector_lr=5e-4, projector_weight_decay=0.01),
)  # fmt: skip
