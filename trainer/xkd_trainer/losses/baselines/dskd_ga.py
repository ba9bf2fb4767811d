"""DSKD-CMA-GA (arXiv 2603.22056): DSKD with cross-model attention, whose queries learn to look like its keys.

Queries are made of the student's embeddings and keys of the teacher's, two distributions that need not meet. A
discriminator D learns to tell them apart, and the projector of the queries learns to deceive it, beside the three
terms of DSKD-CMA (`dual_space`). Both learn in one step: the gradient of D's loss reaches the queries with its sign
turned.

    z = sigmoid(H x) relu(H x) + (1 - sigmoid(H x)) x        D(x) = w leaky_relu(W z), slope 0.1; each with bias
    keys     sum_j -log sigmoid(D(k_j)) / M                  teaches D
    queries  sum_i -log(1 - sigmoid(D(q_i))) / N             teaches D, and `query` with the sign turned

Shape legend for this file
    P tokens of one kind, response only    K width of the common space, 2 D
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from xkd_trainer.data.batch import Batch
from xkd_trainer.losses.declaration import Context, Declaration, Positive, Projectors, StudentPass
from xkd_trainer.losses.dual_space import SPACES, CrossModelLoss, DskdCmaSettings, last_states
from xkd_trainer.losses.ops.term import LossTerm, term


class DskdGaSettings(DskdCmaSettings):
    """Options of the adversary beside those of DSKD-CMA."""

    kq_rate: Positive = 0.01
    """What `keys` and `queries` weigh beside the three terms. The code's default; without it: dskd_cma."""
    hidden: int = Field(default=768, ge=1)
    """Inner width of the discriminator. The code's 768."""


def turn_gradient(x: Tensor) -> Tensor:
    """The same values; what is behind them gets the gradient with its sign turned.

    >>> import torch
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> turn_gradient(x).square().backward()
    >>> x.grad
    tensor(-6.)
    """
    return 2.0 * x.detach() - x


class Discriminator(nn.Module):
    """Logits that vectors are keys, [P, K] to [P]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.highway = nn.Linear(width, width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, x_PK: Tensor) -> Tensor:
        """See the module's first lines."""
        open_PK = self.highway(x_PK)
        gate_PK = open_PK.sigmoid()
        mixed_PK = gate_PK * open_PK.relu() + (1.0 - gate_PK) * x_PK
        logits_P1: Tensor = self.outer(leaky_relu(self.inner(mixed_PK), 0.1))
        return logits_P1[:, 0]


# -- wiring to the cache


class DskdGa(CrossModelLoss):
    """The terms of DSKD-CMA, and what the discriminator makes of `keys` and `queries`, a mean over each."""

    terms = (*SPACES, "keys", "queries")

    def __init__(self, settings: DskdGaSettings, context: Context) -> None:
        super().__init__(context, "dskd_cma_ga")
        self.settings = settings
        self.discriminator = Discriminator(2 * context.teacher_width, settings.hidden)

    def weights(self, step: int) -> Mapping[str, float]:
        """The adversary's share is a setting."""
        return dict.fromkeys(SPACES, 1.0) | dict.fromkeys(("keys", "queries"), self.settings.kq_rate)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """The student's response tokens, and the teacher's for the keys."""
        return {**super().counts(batch), "keys": batch.teacher_predict_valid_BM.sum()}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Both spaces and the adversary."""
        mixed, counts = self.mix(batch, student), self.counts(batch)
        of_keys = self.discriminator(mixed.key_BMK[batch.teacher_predict_valid_BM])
        of_queries = self.discriminator(turn_gradient(mixed.query_BNK[batch.predict_valid_BN]))
        return {
            **self.compare(batch, student, mixed, self.settings),
            "keys": term(softplus(-of_keys).sum(), counts["keys"]),
            "queries": term(softplus(of_queries).sum(), counts["queries"]),
        }


DSKD_CMA_GA = Declaration(
    name="dskd_cma_ga",
    source="DSKD-CMA with key-query matching by an adversary, arXiv 2603.22056",
    settings=DskdGaSettings,
    needs=last_states,
    build=DskdGa,
    default_weight=0.5,
    ce_weight=0.5,
    projectors=Projectors(projector_lr=1e-3, projector_weight_decay=0.01),
)
