"""Cross-entropy, and the divergence between both next-token distributions for a student with the teacher's tokenizer.

`ce`: cross-entropy with the corpus's own responses, which is plain fine-tuning, the base of everything else.

`kl`: forward and reverse KL, Jensen-Shannon, the skewed kinds of DistiLLM (arXiv 2402.03898; SKL and SRKL with skew
0.1) and the adaptive one (arXiv 2404.02657), each a sum over predictions divided by their number. Responses are the
corpus's: DistiLLM's branch on responses that the student generates in each step does not fit a cache (docs/rounds.md).

`rskd`: forward KL from a few drawn classes, whose gradient is that of the full one on average. Of the teacher p in
KL(p || q) = sum p log p - sum p log q the second sum, and all of the gradient by the student q, need nothing but an
unbiased estimate: sum of w over drawn classes instead of p (random-sampling distillation, arXiv 2503.16870). The first
sum is the teacher's entropy with its sign turned, which is stored exactly. Temperature 1. The cache holds some dozens
of bytes a prediction instead of the teacher's last state; training needs no head of the teacher.

Shape legend: see batch.py; N also all predictions of a batch, C those of one chunk, k (K in a batch) drawn classes.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from xkd_schemas.errors import BadData
from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Positive, Settings, StudentPass
from xkd_trainer.losses.dual_space import TeacherHead, teacher_states
from xkd_trainer.losses.ops.divergence import Comparison, Kind, Knobs
from xkd_trainer.losses.ops.lazy_logits import LazyLogits, chunked_sum
from xkd_trainer.losses.ops.shared_pass import Planned
from xkd_trainer.losses.ops.term import LossTerm, term
from xkd_trainer.losses.pairing import OneTokenizerLoss
from xkd_trainer.models.measures import at_least_float32


class KlSettings(Knobs):
    """Which divergence, and how soft."""

    divergence: Kind = "forward_kl"
    """DistiLLM: skewed_reverse_kl or skewed_forward_kl."""
    temperature: Positive = 1.0
    """Divides both logits; no factor of its square. DistiLLM: 1; DSKD's baselines: 2."""


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
    constant_Nk = at_least_float32(weights_Nk)

    def sampled(rows: slice, logits_CV: Tensor) -> Tensor:
        log_q_Ck = logits_CV.log_softmax(-1).gather(-1, ids_Nk[rows])
        return -(constant_Nk[rows] * log_q_Ck).sum(-1) - entropy_N[rows]

    return chunked_sum(sampled, student)


# -- wiring to the cache


class CeSettings(Settings):
    """Which responses are learnt word for word."""

    skip: str = ""
    """Leave out documents whose field `policy` has this value, such as student; other losses keep them."""


class CrossEntropy(Loss):
    """One term, `ce`: nats per predicted target of the documents that are not skipped."""

    terms = ("ce",)

    def __init__(self, skip: str = "") -> None:
        super().__init__()
        self.skip = skip

    def _kept_BN(self, batch: Batch) -> Tensor | None:
        """Which valid predictions count; None for all."""
        if not self.skip or self.skip not in batch.policies:
            return None
        kept_B = batch.predict_valid_BN.new_tensor([policy != self.skip for policy in batch.policies])
        return batch.predict_valid_BN & kept_B[:, None]

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predictions of the documents that are not skipped."""
        kept_BN = self._kept_BN(batch)
        return {"ce": batch.num_predictions if kept_BN is None else kept_BN.sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, Planned | LossTerm]:
        """-log p(target) over those predictions; where some are skipped, in a pass of its own over the others."""
        kept_BN = self._kept_BN(batch)
        if kept_BN is None:
            return {"ce": student.plan.cross_entropy()}
        own = replace(student.plan, valid_BN=kept_BN).cross_entropy()
        return {"ce": term(own.total, own.count)}


class Kl(OneTokenizerLoss):
    """One term, `kl`, per prediction of the student."""

    terms = ("kl",)

    def __init__(self, settings: KlSettings, context: Context) -> None:
        super().__init__("kl", context)
        self.how = Comparison(kind=settings.divergence, temperature=settings.temperature, knobs=settings)
        self.head = TeacherHead(context, "kl")

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, Planned]:
        """Divergence at every valid prediction, over the tokenizer's ids."""
        theirs = self.head(teacher_states(batch))
        return {"kl": student.plan.divergence(theirs, self.how, classes=self.classes)}


class Rskd(OneTokenizerLoss):
    """One term, `sampled_kl`: an unbiased estimate of the forward KL, nats per prediction of the student."""

    terms = ("sampled_kl",)

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
        drawn = batch.teacher_sampled_ids_BMK, batch.teacher_sampled_weights_BMK, batch.teacher_entropy_BM
        own = student.logits.of_classes(slice(self.classes)).at(batch.predict_valid_BN)
        total = head_sampled_kl(own, *(unwrap(values)[batch.predict_valid_BN] for values in drawn))
        return {"sampled_kl": term(total, batch.num_predictions)}


CE = Declaration(
    name="ce", source="maximum likelihood; no teacher", settings=CeSettings, needs=lambda _settings, _levels: (),
    build=lambda settings, _context: CrossEntropy(settings.skip),
)  # fmt: skip
KL = Declaration(
    name="kl", source="forward and reverse KL, JS; DistiLLM, arXiv 2402.03898, off-policy; AKL, arXiv 2404.02657",
    settings=KlSettings, build=Kl, one_tokenizer=True, ce_weight=0,
)  # fmt: skip
RSKD = Declaration(
    name="rskd", source="random-sampling KD, arXiv 2503.16870, classes drawn by threshold (arXiv 0803.0473)",
    needs=lambda _settings, _levels: (Signal("sampled"), Signal("entropy")),
    build=lambda _settings, context: Rskd("rskd", context), one_tokenizer=True, ce_weight=0,
)  # fmt: skip
