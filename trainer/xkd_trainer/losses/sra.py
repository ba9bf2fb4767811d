"""SRA, Span Representation Alignment (arXiv 2605.01205): pieces of text both models cut out, as centres of mass.

L = alpha L_CE + (1 - alpha) (cos L_cos + geo L_Geo + L_KD); alpha is 0.5, `--loss sra`.
L_cos pulls each projected student span vector to the teacher's, L_Geo compares the cosines between
span vectors, L_KD compares what the two heads predict from the span vectors, on the classes both
vocabularies have.

Shape legend for this file
    B documents    K spans    D width    V classes in both vocabularies    N valid spans of all documents
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from xkd_schemas.errors import UsageError
from xkd_trainer.losses.geometry import cosine_distance, pair_disagreement, pair_weights
from xkd_trainer.losses.term import LossTerm, at_least_float32, term
from xkd_trainer.losses.vocabulary import shared_vocabulary as shared_vocabulary
from xkd_trainer.signals import cosine_matrix


class SraSettings(BaseModel):
    """Options of SRA; every default is ours, and its docstring names what paper and code do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spans: Literal["aligned", "word", "phrase"] = "aligned"
    """Pieces that are compared. aligned: between common ends of tokens (paper and code). word, phrase: linguistic
    spans of the response; phrases may overlap."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Teacher layers that L_cos compares besides the last one, which is always among them. Paper: the last alone;
    later scripts: three, two apart. L_Geo and L_KD read the last."""
    student_layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Student blocks, one for each of `layers` below the last, lowest first. Empty: those at the same depth."""
    beta: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    """Weight of each layer in L_cos, lowest first, the last one included; divided by their sum. Empty: all alike."""
    cos: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of L_cos. First code: 1, the first author's later code: 2."""
    geo: float = Field(default=50.0, ge=0, allow_inf_nan=False)
    """Weight of L_Geo. Code: 50; scripts for TinyLLaMA and OPT: 10."""
    tau: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Temperature of L_KD. Code: 2, and 4 for OPT. No tau squared in front, as in the code."""
    p: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Power of a span's mass in its loss weight. Code: 1. 0: every span alike."""
    weights: Literal["attention", "centrality", "uniform"] = "attention"
    """Token weights a_t of each layer. attention: what the last token attends to in that block, heads summed
    (paper). centrality: eq. 5-7 of MTA, arXiv 2605.01374, which needs no attention map.

    The code's first versions took the last row of the padded batch, and fell back to uniform
    without a word where the model gave no attention maps.
    """
    end_token: Literal["exclude", "include"] = "exclude"
    """exclude: a_t is the row of the last text token, and the two end tokens are no span; the authors' input has no
    end token. include: the row of the end token, which is a span, too."""
    kd: Literal["sum", "mean"] = "sum"
    """L_KD over the spans of a document. sum: the code, so it grows with the response. mean: does not."""
    weighted_pooling: bool = True
    """True: spans are pooled by token weights (the paper's WSP). False: plain mean of the tokens."""
    weighted_loss: bool = True
    """True: spans weigh in L_cos and L_Geo by the teacher's mass (the paper's WSL). False: all alike."""
    projector: Literal["xavier", "orthogonal"] = "xavier"
    """How W_l of L_cos begin. xavier: scripts with `--orthogonal False`. orthogonal: the code where nothing is said,
    as in its README; its rows or columns, whichever are fewer, are orthonormal."""
    shared_vocab: Literal["mapped", "exact"] = "mapped"
    """Which classes count as shared, see `vocabulary.shared_vocabulary`. exact: equal strings (the code)."""


def layer_shares(beta: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights of `count` layers divided by their sum; all alike where none are given.

    >>> layer_shares((1.0, 3.0), 2), layer_shares((), 2)
    ((0.25, 0.75), (0.5, 0.5))

    Raises:
        UsageError: There are not as many as layers, or all are 0.
    """
    given = tuple(beta) or (1.0,) * count
    if len(given) != count or not sum(given) > 0:
        raise UsageError(
            f"sra.beta has {len(given)} weights, with sum {sum(given):g}, for {count} layers",
            next="give one for each of sra.layers and one for the last layer, lowest first, not all 0",
        )
    return tuple(share / sum(given) for share in given)


def span_omega(mass_BK: Tensor, valid_BK: Tensor, p: float, weighted: bool) -> Tensor:
    """Loss weight of each span, m_k^p over their sum in the document, [B, K], without gradient; 0 where not valid.

    With `weighted` False, one over the number of valid spans. All 0 for a document whose valid spans
    have no mass at all (unless p is 0): such a document adds 0 to its losses.

    >>> span_omega(torch.tensor([[0.2, 0.6, 0.2]]), torch.tensor([[True, True, False]]), 1.0, True)
    tensor([[0.2500, 0.7500, 0.0000]])
    """
    mass_BK = at_least_float32(mass_BK.detach())
    mass_BK = torch.where(valid_BK, mass_BK if weighted else torch.ones_like(mass_BK), 0.0)
    largest_B1 = mass_BK.amax(-1, keepdim=True) if mass_BK.shape[-1] else mass_BK.sum(-1, keepdim=True)
    relative_BK = mass_BK / torch.where(largest_B1 > 0, largest_B1, 1.0)  # so that a high power does not underflow
    power_BK = torch.where(valid_BK, relative_BK**p, 0.0)
    sum_B1 = power_BK.sum(-1, keepdim=True)
    return power_BK / torch.where(sum_B1 > 0, sum_B1, 1.0)


def weighted_cosine(projected_BKD: Tensor, teacher_BKD: Tensor, omega_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """L_cos of one layer: sum_k omega_k (1 - cos(C_k^S W, C_k^T)) summed over documents.

    The count is the number of documents with a valid span; the code divides by all documents.

    >>> student, teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[8.0, 6.0], [0.0, 2.0]]])
    >>> weighted_cosine(student, teacher, torch.tensor([[0.75, 0.25]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2800), count=tensor(1.))

    Args:
        projected_BKD: The student's span vectors times W (no bias), with gradient.
        teacher_BKD: The teacher's span vectors; get no gradient.
        omega_BK: `span_omega`; gets no gradient.
        valid_BK: Bool, False for padding. A valid zero vector costs omega and has no gradient.
    """
    student_BKD, teacher_BKD = _valid_vectors(projected_BKD, teacher_BKD, valid_BK)
    distance_BK = cosine_distance(student_BKD, teacher_BKD)
    omega_BK = torch.where(valid_BK, omega_BK.detach().to(distance_BK.dtype), 0.0)
    return term((omega_BK * distance_BK).sum(), _documents(valid_BK))


def geometric(student_BKD: Tensor, teacher_BKD: Tensor, omega_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """L_Geo: sum_ij pi_ij (cos(C_i^S, C_j^S) - cos(C_i^T, C_j^T))^2 summed over documents.

    pi_ij = omega_i omega_j for i != j, divided by its sum in the document. A document with one valid
    span has no pair: it adds 0 to the total and is counted, as in the paper's 1/B; one without valid
    spans is not counted. Student vectors are not projected, the widths may differ.

    Two spans at right angles in the student, parallel in the teacher, differ by 1:

    >>> geometric(torch.eye(2)[None], torch.ones(1, 2, 4), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(1.), count=tensor(1.))

    Args and gradient as in `weighted_cosine`.
    """
    student_BKD, teacher_BKD = _valid_vectors(student_BKD, teacher_BKD, valid_BK)
    pi_BKK = pair_weights(omega_BK.detach(), valid_BK)
    sum_B11 = pi_BKK.sum((-2, -1), keepdim=True)
    pi_BKK = pi_BKK / torch.where(sum_B11 > 0, sum_B11, 1.0)
    squares_B = pair_disagreement(cosine_matrix(student_BKD), cosine_matrix(teacher_BKD), pi_BKK, valid_BK)
    return term(squares_B.sum(), _documents(valid_BK))


def _documents(valid_BK: Tensor) -> Tensor:
    """Number of documents with a valid span, scalar int64."""
    return valid_BK.any(-1).sum()


def _valid_vectors(student_BKD: Tensor, teacher_BKD: Tensor, valid_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros where not valid, the teacher's without gradient."""
    valid_BK1 = valid_BK.unsqueeze(-1)
    student_BKD = torch.where(valid_BK1, at_least_float32(student_BKD), 0.0)
    return student_BKD, torch.where(valid_BK1, at_least_float32(teacher_BKD.detach()), 0.0)
