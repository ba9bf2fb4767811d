"""Forward KL from a few drawn classes of the teacher, whose gradient is that of the full one on average.

KL(p || q) = sum p log p - sum p log q. Of the teacher p the second sum, and all of the gradient by the student q, need
nothing but an unbiased estimate of p: sum of w over drawn classes instead of p (random-sampling distillation, arXiv
2503.16870). The first sum is the teacher's entropy with its sign turned, which is stored exactly.

For a student with the teacher's tokenizer, at temperature 1. The cache holds some dozens of bytes a prediction instead
of the teacher's last state; training needs no head of the teacher.

Shape legend: see batch.py; N also all predictions of a batch, C those of one chunk, k (K in a batch) drawn classes.
"""

from collections.abc import Mapping

from torch import Tensor

from xkd_schemas.errors import BadData
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Settings, StudentPass
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked_sum
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import OneTokenizerLoss
from xkd_trainer.models.measures import at_least_float32


def head_sampled_kl(student: LazyLogits, ids_Nk: Tensor, weights_Nk: Tensor, entropy_N: Tensor) -> Tensor:
    """Sum over positions of an unbiased estimate of KL(p || q), in nats, chunk by chunk; 0 where there are none.

    The weights, adding up to 1 at a position, and the teacher's entropy are constants; it has gradient by the
    student's states, and by its head where that requires one. Below 0 where the drawn classes suit the student better
    than all do.

    A uniform student over four classes and a teacher of entropy 0.6 of which classes 0 and 2 were drawn:
    log 4 - 0.6 = 0.7863.

    >>> import torch
    >>> student = LazyLogits(hidden=torch.ones(1, 1), weight=torch.zeros(4, 1))
    >>> head_sampled_kl(student, torch.tensor([[0, 2]]), torch.tensor([[0.8, 0.2]]), torch.tensor([0.6]))
    tensor(0.7863)
    """
    constant_Nk = at_least_float32(weights_Nk.detach())

    def sampled(rows: slice, logits_CV: Tensor) -> Tensor:
        log_q_Ck = logits_CV.log_softmax(-1).gather(-1, ids_Nk[rows])
        return -(constant_Nk[rows] * log_q_Ck).sum(-1) - entropy_N[rows].detach()

    return chunked_sum(sampled, student)


# -- wiring to the cache


class Rskd(OneTokenizerLoss):
    """One term, `sampled_kl`: an unbiased estimate of the forward KL, nats per prediction of the student."""

    terms = ("sampled_kl",)

    def __init__(self, _settings: Settings, context: Context) -> None:
        super().__init__("rskd", context)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predictions; BadData also where a drawn class is no id of the tokenizer."""
        highest = int(unwrap(batch.teacher_sampled_ids_BMK).max())
        if highest >= self.classes:
            raise BadData(
                f"loss rskd: class {highest} is drawn in one of the rows {', '.join(map(str, batch.rows))}, the "
                f"tokenizer has ids below {self.classes}",
                fix="xkd-cache verify CACHE --level deep",
            )
        return super().counts(batch)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Forward KL at every valid prediction, over the tokenizer's ids."""
        valid_BN = batch.predict_valid_BN
        ids_Nk, weights_Nk = (
            unwrap(batch.teacher_sampled_ids_BMK)[valid_BN],
            unwrap(batch.teacher_sampled_weights_BMK)[valid_BN],
        )
        own = student.logits.of_classes(slice(self.classes)).at(valid_BN)
        total = head_sampled_kl(own, ids_Nk, weights_Nk, unwrap(batch.teacher_entropy_BM)[valid_BN])
        return {"sampled_kl": term(total, batch.num_predictions)}


RSKD = Declaration(
    name="rskd",
    source="random-sampling KD, arXiv 2503.16870, classes drawn by threshold (arXiv 0803.0473)",
    needs=lambda _settings, _levels: (Signal("sampled"), Signal("entropy")),
    build=Rskd,
    one_tokenizer=True,
    ce_weight=0,
)
