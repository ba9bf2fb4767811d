"""The divergence between both next-token distributions, for a student with the teacher's tokenizer.

Forward and reverse KL, Jensen-Shannon, the skewed kinds of DistiLLM (arXiv 2402.03898; SKL and SRKL with skew 0.1) and
the adaptive one (arXiv 2404.02657), each a sum over predictions divided by their number. Responses are the corpus's:
DistiLLM's branch on responses that the student generates needs a live teacher and does not fit a cache.
"""

from collections.abc import Mapping

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, Positive, StudentPass
from xkd_trainer.losses.dual_space import TeacherHead, last_states, teacher_states
from xkd_trainer.losses.ops.divergence import Comparison, Kind, Knobs
from xkd_trainer.losses.ops.shared_pass import Planned
from xkd_trainer.losses.pairing import OneTokenizerLoss


class KlSettings(Knobs):
    """Which divergence, and how soft."""

    divergence: Kind = "forward_kl"
    """DistiLLM: skewed_reverse_kl or skewed_forward_kl."""
    temperature: Positive = 1.0
    """Divides both logits; no factor of its square. DistiLLM: 1; DSKD's baselines: 2."""


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


KL = Declaration(
    name="kl",
    source="forward and reverse KL, JS; DistiLLM, arXiv 2402.03898, off-policy; AKL, arXiv 2404.02657",
    settings=KlSettings,
    needs=last_states,
    build=Kl,
    one_tokenizer=True,
    ce_weight=0,
)
