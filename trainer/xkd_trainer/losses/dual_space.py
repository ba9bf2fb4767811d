"""DSKD: distillation in two spaces, the student's and the teacher's, through two learned projections.

arXiv 2406.17328, and the base of DWA-KD. The teacher's states are projected to the student's width and read with the
student's head; the student's are projected to the teacher's width and read with the teacher's head. So each divergence
compares two distributions over one vocabulary. Which teacher state belongs to which student state is settled before:
by position where both models have one tokenizer, by cross-model attention (`cma`) where they do not.

All functions are pure and take response tokens only. Every term is a sum over tokens, to be divided by the number of
the student's response tokens in the whole step. Divergences divide logits by the temperature and have no factor of
its square (as the authors' code).

Shape legend for this file
    B documents    N student predictions    M teacher predictions    D width    V classes
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, gather_rows
from xkd_trainer.losses.declaration import Context, StudentPass, constant_head
from xkd_trainer.losses.ops.cross_model_attention import align_scores
from xkd_trainer.losses.ops.divergence import Kind, Knobs
from xkd_trainer.losses.ops.head_sums import Comparison, LazyLogits, head_argmax, head_cross_entropy, head_divergence
from xkd_trainer.losses.ops.term import LossTerm, term

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DualSpaceSettings(Knobs):
    """How the two distributions are compared, in each space."""

    temperature: Positive = 2.0
    """Divides the logits of both divergences; no factor of its square. Papers and code: 2."""
    student_divergence: Kind = "forward_kl"
    """Student against projected teacher. DSKD's scripts: forward_kl; its code knows the first six."""
    teacher_divergence: Kind = "forward_kl"
    """Projected student against teacher. Always forward_kl in the code of DSKD and DWA-KD."""

    @property
    def student_space(self) -> Comparison:
        """The divergence of the student's space."""
        return self._comparison(self.student_divergence)

    @property
    def teacher_space(self) -> Comparison:
        """The divergence of the teacher's space."""
        return self._comparison(self.teacher_divergence)

    def _comparison(self, kind: Kind) -> Comparison:
        return Comparison(kind=kind, temperature=self.temperature, knobs=self)


class DskdSettings(DualSpaceSettings):
    """Options of DSKD for one tokenizer."""


class DskdCmaSettings(DualSpaceSettings):
    """Options of DSKD with cross-model attention."""

    correct_only: bool = True
    """Compare in the student's space only where the projected teacher predicts the text's next token (the code)."""


def projected_cross_entropy(projected: LazyLogits, target_BN: Tensor, valid_BN: Tensor) -> LossTerm:
    """Cross-entropy of the projected teacher, read with the student's head, against the student's targets.

    Unweighted; eq. 16 of DWA-KD. The gradient goes to the projected states: this is what trains the projectors. DSKD
    holds the student's head fixed here: pass it detached.

    >>> import torch
    >>> logits = LazyLogits(hidden=torch.zeros(1, 2, 3), weight=torch.zeros(4, 3))
    >>> projected_cross_entropy(logits, torch.tensor([[1, 2]]), torch.tensor([[True, False]])).total
    tensor(1.3863)

    Args:
        projected: States [B, N, D].
        target_BN: int64 student token ids; any value at invalid positions.
        valid_BN: Bool.
    """
    return term(head_cross_entropy(projected.at(valid_BN), target_BN[valid_BN]), valid_BN.sum())


def correct(projected: LazyLogits, target_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Where the likeliest class of the projected teacher is the target: DSKD-CMA's mask of the student's space.

    Two classes, states (1, 0) and (0, 1): the classes 0 and 1 are predicted.

    >>> import torch
    >>> logits = LazyLogits(hidden=torch.eye(2)[None], weight=torch.eye(2))
    >>> correct(logits, torch.tensor([[0, 0]]), torch.tensor([[True, True]]))
    tensor([[ True, False]])

    Args:
        projected: States [B, N, D].
        target_BN: int64 classes; any value at invalid positions.
        valid_BN: Bool; states elsewhere are not read.

    Returns:
        [B, N] bool, False at invalid positions. Of equal logits the first class counts.
    """
    return valid_BN & (head_argmax(projected, valid_BN) == target_BN)


def student_space(
    student: LazyLogits,
    projected_teacher: LazyLogits,
    weights_BN: Tensor,
    valid_BN: Tensor,
    settings: DualSpaceSettings,
) -> LossTerm:
    """L_stu: weighted divergence of the student from the projected teacher, over the student's vocabulary.

    Eq. 13 of DWA-KD; in DSKD the weight is 1, and in DSKD-CMA 0 where the projected teacher is wrong (`correct`).

    >>> import torch
    >>> same = LazyLogits(hidden=torch.ones(1, 2, 3), weight=torch.eye(3))
    >>> student_space(same, same, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), DskdSettings())
    LossTerm(total=tensor(0.), count=tensor(2.))

    Args:
        student: States [B, N, D] and the student's own head; both learn unless detached by the caller.
        projected_teacher: States [B, N, D] and the student's head. Detached here: nothing reaches the projectors.
        weights_BN: A constant, such as ones. Where it is 0 nothing is computed, and the token is counted.
        valid_BN: Bool.
        settings: Divergence and temperature.
    """
    chosen_BN = valid_BN & (weights_BN != 0)
    total = head_divergence(
        student.at(chosen_BN), projected_teacher.at(chosen_BN), weights_BN[chosen_BN], settings.student_space
    )
    return term(total, valid_BN.sum())


def teacher_space(
    projected_student: LazyLogits,
    teacher: LazyLogits,
    weights_BM: Tensor,
    valid_BM: Tensor,
    settings: DualSpaceSettings,
    *,
    count: Tensor,
) -> LossTerm:
    """L_tea: weighted divergence of the projected student from the teacher, over the teacher's vocabulary.

    Eq. 15 of DWA-KD; in DSKD the weight is 1. A sum over the teacher's tokens that is divided by the number of the
    student's, like every other term.

    >>> import torch
    >>> same, valid = LazyLogits(hidden=torch.ones(1, 2, 3), weight=torch.eye(3)), torch.ones(1, 2, dtype=torch.bool)
    >>> teacher_space(same, same, torch.ones(1, 2), valid, DskdSettings(), count=torch.tensor(5))
    LossTerm(total=tensor(0.), count=tensor(5.))

    Args:
        projected_student: States [B, M, D] and the teacher's head; the gradient reaches projector and student.
        teacher: States [B, M, D] and the teacher's head, constants.
        weights_BM: A constant, such as ones.
        valid_BM: Bool.
        settings: Divergence and temperature.
        count: Scalar, the number of valid student predictions.
    """
    total = head_divergence(
        projected_student.at(valid_BM), teacher.at(valid_BM), weights_BM[valid_BM], settings.teacher_space
    )
    return term(total, count)


# What the losses of the DSKD family share: the teacher's constants, its side of a batch, and the scores between both.
#
# Shape legend: see batch.py; d is the student's width, K that of the common space, 2 D.


class TeacherHead(nn.Module):
    """The teacher's head as buffers that move with the loss and are not saved."""

    def __init__(self, context: Context, who: str) -> None:
        super().__init__()
        head = constant_head(context.teacher_head(), who)
        self.weight_VD: Tensor
        self.bias_V: Tensor | None
        self.register_buffer("weight_VD", head.weight_VD, persistent=False)
        self.register_buffer("bias_V", head.bias_V, persistent=False)

    def forward(self, hidden: Tensor) -> LazyLogits:
        """Logits of states [..., D], not made yet."""
        return LazyLogits(hidden=hidden, weight=self.weight_VD, bias=self.bias_V)


def last_states(settings: object, levels: object) -> tuple[Signal, ...]:
    """What a loss of last states needs; heads and embeddings are always in the cache."""
    return (Signal("hidden_last"),)


def teacher_states(batch: Batch) -> Tensor:
    """The teacher's states that predict its targets, [B, M, D], float32."""
    assert batch.teacher_hidden_BRD is not None
    return gather_rows(batch.teacher_hidden_BRD, batch.teacher_predict_BM).float()


def own_at(student: StudentPass, index_BE: Tensor) -> LazyLogits:
    """The student's logits at some of its predictions, [B, E] positions; the head learns from them."""
    own = student.logits
    return replace(own, hidden=gather_rows(own.hidden, index_BE))


def with_fixed_head(student: StudentPass, hidden_BNd: Tensor) -> LazyLogits:
    """States of the student's width read with the student's head, which learns nothing from it."""
    return replace(student.logits.detached(), hidden=hidden_BNd)


def at_valid(layer: nn.Module, x_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """The layer's output at valid positions and 0 elsewhere: a ragged batch is mostly padding.

    >>> at_valid(nn.Identity(), torch.ones(1, 2, 1), torch.tensor([[True, False]]))
    tensor([[[1.],
             [0.]]])
    """
    rows_P = valid_BN.flatten().nonzero()[:, 0]
    found_PE: Tensor = layer(x_BND.flatten(0, 1)[rows_P])
    out_QE = found_PE.new_zeros(valid_BN.numel(), found_PE.shape[-1]).index_copy(0, rows_P, found_PE)
    return out_QE.view(*valid_BN.shape, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The teacher's side of one batch, float32, gathered at its predictions."""

    hidden_BMD: Tensor
    target_BMD: Tensor
    """Embeddings of the ids that are predicted."""
    input_BMD: Tensor
    """Embeddings of the ids at the predicting positions."""

    def values_BMD(self, hidden_std: float, embedding_std: float) -> Tensor:
        """N(h_j) + N(E(y_j+1)): what a student token takes from the teacher tokens it looks at."""
        return self.hidden_BMD / hidden_std + self.target_BMD / embedding_std


def teacher_side(batch: Batch, embeddings_VD: Tensor) -> Teacher:
    """States and embeddings at the teacher's predictions."""
    return Teacher(
        hidden_BMD=teacher_states(batch),
        target_BMD=embeddings_VD[batch.teacher_target_BM].float(),
        input_BMD=embeddings_VD[batch.teacher_input_BM].float(),
    )


def attention_scores(
    batch: Batch, student: StudentPass, teacher: Teacher, query: nn.Module, embedding_std: float
) -> Tensor:
    """Cross-model attention scores of DSKD-CMA, [B, N, M]; the student's embeddings are constants here.

    `query` projects [.., 2 d] to [.., 2 D].
    """
    input_ids_BN = batch.student_ids_BS.gather(1, batch.predict_BN)
    embedded_BNd = [student.embeddings_Vd[ids_BN] for ids_BN in (input_ids_BN, batch.target_BN)]
    query_BNK = at_valid(query, torch.cat(embedded_BNd, dim=-1).detach(), batch.predict_valid_BN)
    key_BMK = torch.cat([teacher.input_BMD, teacher.target_BMD], dim=-1) / embedding_std
    return align_scores(query_BNK, key_BMK, batch.predict_valid_BN, batch.teacher_predict_valid_BM)
