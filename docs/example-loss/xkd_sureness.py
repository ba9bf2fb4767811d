"""`sureness`: where both models predict the same piece of text, the student is to be as sure of it as the teacher.

L = mean over exact pairs (i, j) of ((H_i - H_j) / scale)^2, with H the entropy in nats of the student's prediction i
and the teacher's prediction j. An example, not a published loss.

Shape legend: B documents, N student predictions, E exact pairs.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from xkd_schemas.signals import Signal
from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, Loss, Settings, StudentPass
from xkd_trainer.losses.ops.term import LossTerm, term


class SurenessSettings(Settings):
    """What `--set losses.sureness.scale=2` may set."""

    scale: float = Field(default=1.0, gt=0)
    """Nats that cost 1."""


def squared_gaps(student_E: Tensor, teacher_E: Tensor, scale: float) -> LossTerm:
    """Sum over pairs of the squared difference of entropies.

    >>> squared_gaps(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]), 2.0)
    LossTerm(total=tensor(1.), count=tensor(2.))
    """
    gaps_E = (student_E - teacher_E.detach()) / scale
    return term(gaps_E.square().sum(), torch.tensor(len(gaps_E), device=gaps_E.device))


class Sureness(Loss):
    """One term, `entropy`, per exact pair. It has no projectors; if it had, they would be submodules here."""

    terms = ("entropy",)

    def __init__(self, settings: SurenessSettings, _context: Context) -> None:
        super().__init__()
        self.scale = settings.scale

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Exact pairs, known before anything is computed."""
        return {"entropy": batch.pair_valid_BE.sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Entropies at the pairs only: logits of other positions are never made."""
        assert batch.teacher_entropy_BM is not None
        row_E = batch.pair_valid_BE.nonzero()[:, 0]
        n_E, m_E = batch.pairs_BE2[batch.pair_valid_BE].unbind(-1)
        at_pairs = torch.zeros_like(batch.predict_valid_BN)
        at_pairs[row_E, n_E] = True
        log_p = student.logits.at(at_pairs).dense().log_softmax(-1)
        entropy_BN = torch.zeros(at_pairs.shape, dtype=log_p.dtype, device=log_p.device)
        entropy_BN = entropy_BN.masked_scatter(at_pairs, -(log_p.exp() * log_p).sum(-1))
        return {"entropy": squared_gaps(entropy_BN[row_E, n_E], batch.teacher_entropy_BM[row_E, m_E], self.scale)}


SURENESS = Declaration(
    name="sureness",
    source="the example of docs/adding-a-loss.md",
    settings=SurenessSettings,
    needs=lambda _settings, _levels: (Signal("entropy"),),
    build=Sureness,
)
