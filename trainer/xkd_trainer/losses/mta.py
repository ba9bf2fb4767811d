"""MTA, Multi-Granular Trajectory Alignment (arXiv 2605.01374): words in a low layer, phrases in higher ones.

DSA compares how the spans of a document lie to each other in student and teacher: it needs the
teacher's cosines and span weights, no projector, and no shared tokenizer. Hid compares projected
student vectors with the teacher's. L = L_base + lambda_dsa L_DSA + lambda_hid L_Hid (eq. 14).

Where the paper and the authors' code differ, the settings below say so. One more difference: the
code keeps a span that has no token on one side, as a zero vector; here the caller marks it not valid.

Shape legend for this file
    B documents    K spans, or tokens for Hid on tokens    L tokens    M predictions    D teacher width
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from xkd_trainer.losses.geometry import cosine_distance, pair_disagreement, pair_weights
from xkd_trainer.losses.term import LossTerm, at_least_float32, term


class MtaSettings(BaseModel):
    """Options of MTA; every default is ours, and its docstring names what paper and code do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lambda_dsa: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Weight of DSA. Paper: 2 for GPT-2 and Qwen1.5, 3 for OPT; 0 turns it off."""
    lambda_hid: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Weight of Hid. Paper: 0.2, and 0.3 for OPT. The code has one weight, w (DSA + Hid / 10); 0 turns it off."""
    student_pooling: Literal["own", "teacher", "uniform"] = "own"
    """Token weights that pool the student's spans (eq. 8 leaves it open).

    own: centrality of the student's own states, without gradient (the code). teacher: the teacher's, for documents
    that both models read as the same ids; others are left out and counted. uniform: plain mean.
    """
    dsa_vectors: Literal["own", "projected"] = "own"
    """The student's span vectors that DSA compares. own: as they are (eq. 11). projected: P_l of them, a linear layer
    with bias, as in the authors' code for two tokenizers, which has no Hid beside it; with Hid both read one P_l."""
    hid: Literal["spans", "token", "off"] = "spans"
    """Vectors that Hid compares. spans: span vectors, weighted by the teacher's span weights; works across tokenizers.

    token: states of the tokens that spans cover, weighted by the teacher's token weights (eq. 13 and the code), for
    documents that both models read as the same ids; others are left out and counted. off: no Hid, as in the authors'
    cross-tokenizer code.
    """
    hid_layers: Literal["mean", "sum"] = "mean"
    """Over the picked layers. sum: eq. 13. mean: the code; lambda_hid then means the same for any number of layers."""
    word_spans: Literal["all", "in_phrases"] = "all"
    """Words of the word-level layer. all: the paper's text. in_phrases: the code, only words inside a kept phrase."""
    spans_over: Literal["all", "response"] = "all"
    """all: prompt and response, as paper and code do. response: spans of target segments only."""
    span_weights: Literal["centrality", "entropy", "uniform"] = "centrality"
    """Teacher token weights: their sum weighs a span, and they weigh the tokens of hid=token; they do not pool.

    centrality: eq. 5-7, 9. entropy: 1 - H_t / log V (an option of the code), known where the teacher predicts a token
    of the response and 0 elsewhere, so that spans of the prompt take no part. uniform: each span, and each token, 1
    ("no weights" of the ablation).
    """
    pick: Literal["cached", "strided"] = "cached"
    """Layers. cached: every cached level, beside the student layer at the same depth. strided (the paper): student
    layers from the top down, the lowest on words, the others on phrases, each beside phi(l) = floor(l N_T / N_S)."""
    num_layers: int = Field(default=3, ge=1)
    """Student layers that strided picks; 3 was the paper's best on GPT-2."""
    stride: int = Field(default=0, ge=0)
    """Distance of the layers that strided picks. 0: the student's depth over num_layers + 1, so that the lowest of
    three lies in the middle."""
    student_layers: tuple[int, ...] = ()
    """Student blocks (1 is the first), lowest first: one for each cached level, or those that strided takes. Empty:
    as `pick` says."""


def strided_layers(student_layers: int, num: int, stride: int) -> tuple[int, ...]:
    """Student layers from the top down, `stride` apart, in ascending order; those below 1 are not left out.

    >>> strided_layers(12, 3, 0), strided_layers(24, 6, 2)
    ((6, 9, 12), (14, 16, 18, 20, 22, 24))
    """
    step = stride or max(1, student_layers // (num + 1))
    return tuple(student_layers - step * n for n in reversed(range(num)))


def phi(layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher layer beside a student layer: floor(l N_T / N_S), at least 1.

    >>> [phi(layer, 12, 48) for layer in (6, 9, 12)]
    [24, 36, 48]
    """
    return max(1, layer * teacher_layers // student_layers)


def sureness(entropy: Tensor, classes: int) -> Tensor:
    """1 - H / log V, from 0 for a teacher that knows nothing to 1 for one that is sure; any shape, nats.

    >>> sureness(torch.tensor([0.0, math.log(2.0), math.log(4.0)]), classes=4)
    tensor([1.0000, 0.5000, 0.0000])
    """
    return (1.0 - entropy / math.log(classes)).clamp(0.0, 1.0)


def covered(spans_BK2: Tensor, valid_BK: Tensor, length: int) -> Tensor:
    """Tokens that lie in some valid span, bool [B, L]: M_l of eq. 13.

    >>> covered(torch.tensor([[[0, 2], [1, 3], [4, 5]]]), torch.tensor([[True, True, False]]), 5)
    tensor([[ True,  True,  True, False, False]])
    """
    place_L = torch.arange(length, device=spans_BK2.device)
    inside_BKL = (place_L >= spans_BK2[..., :1]) & (place_L < spans_BK2[..., 1:])
    return (inside_BKL & valid_BK.unsqueeze(-1)).any(1)


def range_sums(weights_BL: Tensor, spans_BK2: Tensor) -> Tensor:
    """Sum of the weights inside each half-open range, [B, K]; 0 for an empty one.

    >>> range_sums(torch.tensor([[0.5, 0.25, 0.125]]), torch.tensor([[[0, 2], [1, 3], [0, 0]]]))
    tensor([[0.7500, 0.3750, 0.0000]])
    """
    place_L = torch.arange(weights_BL.shape[1], device=spans_BK2.device)
    inside_BKL = (place_L >= spans_BK2[..., :1]) & (place_L < spans_BK2[..., 1:])
    return torch.where(inside_BKL, weights_BL.unsqueeze(1), 0.0).sum(-1)


def span_weights(mass_BK: Tensor, valid_BK: Tensor) -> Tensor:
    """Each document's span masses divided by their sum (eq. 9), [B, K], without gradient; 0 where not valid.

    What `dsa` and `hid` are given, for eq. 9 and for the code: both then weigh documents nearly alike,
    however much of a document its spans cover.

    >>> span_weights(torch.tensor([[0.1, 0.3, 0.6]]), torch.tensor([[True, True, False]]))
    tensor([[0.2500, 0.7500, 0.0000]])
    """
    mass_BK = torch.where(valid_BK, at_least_float32(mass_BK.detach()), 0.0)
    sum_B1 = mass_BK.sum(-1, keepdim=True)
    return mass_BK / torch.where(sum_B1 > 0, sum_B1, 1.0)


def dsa(student_cosines_BKK: Tensor, teacher_cosines_BKK: Tensor, omega_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """Disagreement of the span geometries of one layer, eq. 11 as a weighted mean over pairs.

    total = sum over documents and pairs i != j of omega_i omega_j (cos_ij^S - cos_ij^T)^2, count =
    the same sum of omega_i omega_j. Eq. 11 prints the sum alone, with weights that sum to 1 in a
    document; the code divides, and so do we: a mean does not grow with the batch. A document with
    one valid span has no pair and adds 0 to both.

    Two spans at right angles in the student, parallel in the teacher, weights 0.6 and 0.2: both
    ordered pairs weigh 0.12 and differ by 1.

    >>> dsa(torch.eye(2)[None], torch.ones(1, 2, 2), torch.tensor([[0.6, 0.2]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2400), count=tensor(0.2400))

    Args:
        student_cosines_BKK: From `signals.cosine_matrix`, with gradient.
        teacher_cosines_BKK: From the cache; gets no gradient.
        omega_BK: `span_weights` of the teacher's masses (eq. 9 and the code). Taken as it is: raw masses weigh
            a document by the square of the mass its spans cover. Gets no gradient.
        valid_BK: Bool, False for padding and for spans without a token on either side.
    """
    weights_BKK = pair_weights(omega_BK.detach(), valid_BK)
    squares_B = pair_disagreement(student_cosines_BKK, teacher_cosines_BKK.detach(), weights_BKK, valid_BK)
    return term(squares_B.sum(), weights_BKK.to(squares_B.dtype).sum())


def hid(projected_student_BKD: Tensor, teacher_BKD: Tensor, weights_BK: Tensor, valid_BK: Tensor) -> LossTerm:
    """Cosine distance of projected student vectors to the teacher's in one layer, eq. 13 as a weighted mean.

    total = sum w (1 - cos), count = sum w, over valid spans, or over valid tokens. Eq. 13 prints the
    sum alone; the code divides by the sum of weights. A zero vector costs 1 and has no gradient.

    >>> student, teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[8.0, 6.0], [0.0, 2.0]]])
    >>> hid(student, teacher, torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]))
    LossTerm(total=tensor(0.2700), count=tensor(0.7500))

    Args:
        projected_student_BKD: P_l applied to the student's span or token vectors (eq. 12), with gradient.
        teacher_BKD: The teacher's vectors; get no gradient.
        weights_BK: The teacher's weights, for the code normalised in each document; taken as they are, no gradient.
        valid_BK: Bool, False for padding.
    """
    valid_BK1 = valid_BK.unsqueeze(-1)
    student_BKD = torch.where(valid_BK1, at_least_float32(projected_student_BKD), 0.0)
    distance_BK = cosine_distance(student_BKD, torch.where(valid_BK1, teacher_BKD.detach(), 0.0))
    weights_BK = torch.where(valid_BK, weights_BK.detach().to(distance_BK.dtype), 0.0)
    return term((weights_BK * distance_BK).sum(), weights_BK.sum())
