"""DSKD: distillation in two spaces, the student's and the teacher's, through two learned projections.

arXiv 2406.17328, and the base of DWA-KD. The teacher's states are projected to the student's width and read with the
student's head; the student's are projected to the teacher's width and read with the teacher's head. So each divergence
compares two distributions over one vocabulary. Which teacher state belongs to which student state is settled before:
by position where both models have one tokenizer, by cross-model attention where they do not: both models' token
embeddings are projected into one space and attend across the two tokenizations.

All of it takes response tokens only. Three terms, eq. 16, 13 and 15 of DWA-KD:
    projected_ce   cross-entropy of the projected teacher, read with the student's head, which is fixed, against the
                   student's targets; it trains the projectors
    student_space  divergence of the student from the projected teacher, a constant, over the student's vocabulary
    teacher_space  divergence of the projected student from the teacher over the teacher's vocabulary; a sum over the
                   teacher's tokens that is divided by the number of the student's, like every other term
Divergences divide logits by the temperature and have no factor of its square (as the authors' code).

Shape legend for this file
    B documents    N student predictions    M teacher predictions    D width (of the teacher)    d the student's width
    V classes    K width of the common space, 2 D
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xkd_trainer.data.batch import Batch, gather_rows, unwrap
from xkd_trainer.losses.declaration import Context, Loss, Positive, StudentPass, constant_head
from xkd_trainer.losses.ops.divergence import Comparison, Kind, Knobs
from xkd_trainer.losses.ops.lazy_logits import LazyLogits
from xkd_trainer.losses.softdtw import look_at
from xkd_trainer.models.measures import at_least_float32

BLOCK_SCORES: Final = 1 << 20
"""Scores that `attend` makes at a time, 4 MB in float32."""

SPACES: Final = ("projected_ce", "student_space", "teacher_space")  # names of the three terms

MASKED = -1e5  # score of a pair in which either side is padding, as in the authors' code; its exponential is exactly 0


class DualSpaceSettings(Knobs):
    """How the two distributions are compared, in each space."""

    temperature: Positive = 2.0  # divides the logits of both divergences; no factor of its square. Papers and code: 2
    student_divergence: Kind = "forward_kl"
    """Student against projected teacher. DSKD's scripts: forward_kl; its code knows the first six."""
    teacher_divergence: Kind = "forward_kl"
    """Projected student against teacher. Always forward_kl in the code of DSKD and DWA-KD."""

    @property
    def student_space(self) -> Comparison:
        """The divergence of the student's space."""
        return Comparison(kind=self.student_divergence, temperature=self.temperature, knobs=self)

    @property
    def teacher_space(self) -> Comparison:
        """The divergence of the teacher's space."""
        return Comparison(kind=self.teacher_divergence, temperature=self.temperature, knobs=self)


def align_scores(query_BNK: Tensor, key_BMK: Tensor, student_valid_BN: Tensor, teacher_valid_BM: Tensor) -> Tensor:
    """Q K^T / sqrt(K) where both tokens are valid, MASKED elsewhere: [B, N, M], float32 or better.

    Q is the projected [E^S(x_i); E^S(x_i+1)], whose embeddings DSKD detaches before the projector, K the teacher's
    constant N([E^T(y_j); E^T(y_j+1)]). Vectors of invalid tokens are finite, on either side, and change nothing. The
    softmax of a row is uniform over all tokens where the row's own is padding, and exactly 0 at padding elsewhere.
    """
    scores_BNM = at_least_float32(query_BNK) @ at_least_float32(key_BMK).mT / math.sqrt(query_BNK.shape[-1])
    return torch.where(student_valid_BN[:, :, None] & teacher_valid_BM[:, None, :], scores_BNM, MASKED)


def attend(
    query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], values_BMd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each query token takes of the values, [B, N, d], and without gradient the mean place, counted from 1, and
    the entropy, both [B, N], of what it attends to; both sides are vectors and which of them are tokens.

    Some rows of scores at a time; of several blocks each is made again for the gradient.
    """
    key_BMK, key_valid_BM = key

    def work(query_BRK: Tensor, key_BMK: Tensor, values_BMd: Tensor, valid_BR: Tensor) -> tuple[Tensor, ...]:
        share_BRM = align_scores(query_BRK, key_BMK, valid_BR, key_valid_BM).softmax(-1)
        return share_BRM @ values_BMd, *look_at(share_BRM)

    step = max(1, BLOCK_SCORES // max(1, key_valid_BM.numel()))
    blocks = list(zip(*(torch.split(side, step, dim=1) for side in query), strict=True))
    again = partial(checkpoint, work, use_reentrant=False, preserve_rng_state=False) if blocks[1:] else work
    done = [again(query_BRK, key_BMK, values_BMd, valid_BR) for query_BRK, valid_BR in blocks]
    mixed_BNd, attended_BN, entropy_BN = (torch.cat(parts, 1) for parts in zip(*done, strict=True))
    return mixed_BNd, attended_BN, entropy_BN


# -- wiring to the cache


class TeacherHead(nn.Module):
    """The teacher's head as buffers that move with the loss and are not saved; of some classes, or all."""

    def __init__(self, context: Context, who: str, classes: Tensor | None = None) -> None:
        super().__init__()
        head = constant_head(context.teacher_head(), who)
        rows = slice(None) if classes is None else classes
        self.weight_VD = nn.Buffer(head.weight_VD[rows], persistent=False)
        self.bias_V = None if head.bias_V is None else nn.Buffer(head.bias_V[rows], persistent=False)

    def forward(self, hidden: Tensor) -> LazyLogits:
        """Logits of states [..., D], not made yet."""
        return LazyLogits(hidden=hidden, weight=self.weight_VD, bias=self.bias_V)


def teacher_states(batch: Batch) -> Tensor:
    """The teacher's states that predict its targets, [B, M, D], float32."""
    return gather_rows(unwrap(batch.teacher_hidden_BRD), batch.teacher_predict_BM).float()


def with_fixed_head(student: StudentPass, hidden_BNd: Tensor) -> LazyLogits:
    """States of the student's width read with the student's head, which learns nothing from it."""
    return replace(student.logits.detach(), hidden=hidden_BNd)


def at_valid(layer: nn.Module, x_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """The layer's output at valid positions and 0 elsewhere: a ragged batch is mostly padding."""
    rows_P = valid_BN.flatten().nonzero()[:, 0]
    found_PE: Tensor = layer(x_BND.flatten(0, 1)[rows_P])
    out_QE = found_PE.new_zeros(valid_BN.numel(), found_PE.shape[-1]).index_copy(0, rows_P, found_PE)
    return out_QE.view(*valid_BN.shape, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixed:
    """Both sides of one batch, float32, brought together by cross-model attention."""

    query_BNK: Tensor  # what attends: the student's embeddings in the common space; 0 where not valid
    key_BMK: Tensor  # what is attended to: the teacher's embeddings, constants
    hidden_BMD: Tensor  # the teacher's states at its predictions
    target_BMD: Tensor  # its embeddings of the ids that are predicted
    seen: tuple[Tensor, Tensor]  # `look_at` of the teacher tokens that each student token attends to
    projected: LazyLogits  # the teacher at the student's positions, read with the student's head, which is fixed
    back: LazyLogits  # the student at the teacher's positions, read with the teacher's head


class CrossModelLoss(Loss):
    """Base of DSKD-CMA and DWA-KD; projectors are single linear layers with bias, as the authors configure them."""

    def __init__(self, context: Context, who: str) -> None:
        super().__init__()
        self.hidden_std, self.embedding_std = context.hidden_std, context.embedding_std
        d, wide = context.student_width, context.teacher_width
        self.t2s = nn.Linear(wide, d)
        self.s2t = nn.Linear(d, wide)
        self.query = nn.Linear(2 * d, 2 * wide)
        self.head = TeacherHead(context, who)
        self.embeddings_VD = nn.Buffer(context.teacher_embeddings(), persistent=False)

    def mix(self, batch: Batch, student: StudentPass) -> Mixed:
        """What each token takes from the other model; the student's embeddings are constants in the scores."""
        s_valid_BN, t_valid_BM = batch.predict_valid_BN, batch.teacher_predict_valid_BM
        input_ids_BN = batch.student_ids_BS.gather(1, batch.predict_BN)
        embeddings_Vd = student.embeddings_Vd.detach()
        query_BNk = torch.cat([embeddings_Vd[ids] for ids in (input_ids_BN, batch.target_BN)], dim=-1).float()
        input_BMD, target_BMD = (
            self.embeddings_VD[ids].float() for ids in (batch.teacher_input_BM, batch.teacher_target_BM)
        )
        key_BMK = torch.cat([input_BMD, target_BMD], dim=-1) / self.embedding_std
        query_BNK, hidden_BMD = at_valid(self.query, query_BNk, s_valid_BN), teacher_states(batch)
        values_BMd = at_valid(self.t2s, hidden_BMD / self.hidden_std + target_BMD / self.embedding_std, t_valid_BM)
        values_BND = at_valid(self.s2t, student.predict_hidden_BNd, s_valid_BN)
        own, theirs = (query_BNK, s_valid_BN), (key_BMK, t_valid_BM)
        mixed_BNd, *seen = attend(own, theirs, values_BMd)
        mixed_BMD, *_ = attend(theirs, own, values_BND)
        return Mixed(
            query_BNK=query_BNK, key_BMK=key_BMK, hidden_BMD=hidden_BMD, target_BMD=target_BMD,
            seen=(seen[0], seen[1]), projected=with_fixed_head(student, mixed_BNd), back=self.head(mixed_BMD),
        )  # fmt: skip
