"""What the losses of the DSKD family share: the teacher's constants, its side of a batch, and the scores between both.

Shape legend: see batch.py; d is the student's width, K that of the common space, 2 D.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch, gather_rows
from xkd_trainer.losses.cma import align_scores
from xkd_trainer.losses.head import LazyLogits
from xkd_trainer.methods.declaration import Context, StudentPass, constant_head


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
