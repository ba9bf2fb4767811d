"""The divergence between both next-token distributions, for a student with the teacher's tokenizer.

Forward and reverse KL, Jensen-Shannon, the skewed kinds of DistiLLM (arXiv 2402.03898; SKL and SRKL with skew 0.1) and
the adaptive one (arXiv 2404.02657), each a sum over predictions divided by their number. Responses are the corpus's:
DistiLLM's branch on responses that the student generates needs a live teacher and does not fit a cache.

Shape legend: see batch.py; V classes of both heads.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, StudentPass
from xkd_trainer.losses.dual_space import Positive, TeacherHead, last_states, teacher_states
from xkd_trainer.losses.ops.divergence import Kind, Knobs
from xkd_trainer.losses.ops.head_sums import Comparison
from xkd_trainer.losses.ops.shared_pass import Planned
from xkd_trainer.losses.same_tokenizer import refuse_other_predictions, refuse_two_tokenizers


class KlSettings(Knobs):
    """Which divergence, and how soft."""

    divergence: Kind = "forward_kl"
    """DistiLLM: skewed_reverse_kl or skewed_forward_kl."""
    temperature: Positive = 1.0
    """Divides both logits; no factor of its square. DistiLLM: 1; DSKD's baselines: 2."""


class Kl(nn.Module):
    """One term, `kl`, per prediction of the student."""

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: KlSettings, context: Context) -> None:
        super().__init__()
        refuse_two_tokenizers("kl", context)
        self.how = Comparison(kind=settings.divergence, temperature=settings.temperature, knobs=settings)
        self.head = TeacherHead(context, "kl")
        self.classes = max(context.student_vocab.values()) + 1
        """Ids of the tokenizer; heads may have rows beyond them, and not the same number."""

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor 1."""
        return {"kl": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predictions.

        Raises:
            BadData: A document has not the same number of predictions in both models.
        """
        refuse_other_predictions("kl", batch)
        return {"kl": batch.num_predictions}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, Planned]:
        """Divergence at every valid prediction, over the tokenizer's ids."""
        theirs = self.head(teacher_states(batch))
        return {"kl": student.plan.divergence(theirs, self.how, classes=self.classes)}


KL = Declaration(
    name="kl",
    source="forward and reverse KL, JS; DistiLLM, arXiv 2402.03898, off-policy; AKL, arXiv 2404.02657",
    settings=KlSettings,
    needs=last_states,
    build=Kl,
    one_tokenizer=True,
    ce_weight=0,
)
