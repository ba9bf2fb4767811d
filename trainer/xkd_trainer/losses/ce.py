"""Cross-entropy with the corpus's own responses: plain fine-tuning, the base of everything else."""

from collections.abc import Mapping

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Declaration, Loss, StudentPass
from xkd_trainer.losses.ops.shared_pass import Planned


class CrossEntropy(Loss):
    """One term, `ce`: nats per predicted target."""

    terms = ("ce",)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, Planned]:
        """-log p(target) over the valid predictions."""
        return {"ce": student.plan.cross_entropy()}


CE = Declaration(
    name="ce",
    source="maximum likelihood; no teacher",
    needs=lambda _settings, _levels: (),
    build=lambda _settings, _context: CrossEntropy(),
)
