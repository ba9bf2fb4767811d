"""Cross-entropy with the corpus's own responses: plain fine-tuning, the base of everything else."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, StudentPass
from xkd_trainer.losses.ops.shared_pass import Planned


class CeSettings(BaseModel):
    """There is nothing to set."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CrossEntropy(nn.Module):
    """One term, `ce`: nats per predicted target."""

    layers: tuple[int, ...] = ()
    attention = False

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor 1."""
        return {"ce": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predicted targets."""
        return {"ce": batch.num_predictions}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, Planned]:
        """-log p(target) over the valid predictions."""
        return {"ce": student.plan.cross_entropy()}


def _build(_settings: CeSettings, _context: Context) -> CrossEntropy:
    return CrossEntropy()


CE = Declaration(
    name="ce",
    source="maximum likelihood; no teacher",
    settings=CeSettings,
    needs=lambda _settings, _levels: (),
    build=_build,
)
