"""The equations of CE, MTA and SRA as loops over plain floats, and ragged batches to hold the fast code against them.

One document at a time, no padding, no tensors: slow enough to be obviously right.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Vector = Sequence[float]


# Ragged batches


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths(seed: int, low: int = 0, high: int = 6) -> list[int]:
    g = generator(seed)
    count = int(torch.randint(1, 5, (), generator=g))
    return torch.randint(low, high + 1, (count,), generator=g).tolist()


def ragged(seed: int, sizes: Sequence[int], *shape: int) -> list[Tensor]:
    g = generator(seed)
    return [torch.randn(size, *shape, generator=g, dtype=torch.float64) for size in sizes]


def masses(seed: int, sizes: Sequence[int]) -> list[Tensor]:
    return [values.exp() / 10 for values in ragged(seed, sizes)]


def padded(documents: Sequence[Tensor], fill: float = 0.0, length: int | None = None) -> Tensor:
    """[B, K, ...] with `fill` after each document's own rows."""
    longest = max((len(d) for d in documents), default=0) if length is None else length
    out = torch.full((len(documents), longest, *documents[0].shape[1:]), fill, dtype=documents[0].dtype)
    for row, document in enumerate(documents):
        out[row, : len(document)] = document
    return out


def mask(sizes: Sequence[int]) -> Tensor:
    return torch.arange(max(sizes, default=0)) < torch.tensor(list(sizes))[:, None]


def with_gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.detach().clone().requires_grad_()
    value = loss(at)
    (gradient,) = torch.autograd.grad(value, at)
    return value.detach(), gradient


# Vectors


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    size = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / size if size else 0.0


def softmax(scores: Vector) -> list[float]:
    peak = max(scores)
    powers = [math.exp(s - peak) for s in scores]
    total = math.fsum(powers)
    return [p / total for p in powers]


# Signals


def centrality(hidden: Sequence[Vector]) -> list[float]:
    """MTA eq. 5-7 for one document."""
    if len(hidden) == 1:
        return [1.0]
    width = len(hidden[0]) if len(hidden) else 0
    unit = []
    for h in hidden:
        mean = math.fsum(h) / width
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in h) / (width - 1))
        unit.append([x / (std + 1e-5) for x in h])
    weights = [0.0] * len(hidden)
    for s in range(len(hidden)):
        others = [t for t in range(len(hidden)) if t != s]
        attended = softmax([dot(unit[s], unit[t]) / math.sqrt(width) for t in others])
        for t, a in zip(others, attended, strict=True):
            weights[t] += a / len(hidden)
    return weights


def pool(hidden: Sequence[Vector], weights: Vector, start: int, end: int) -> tuple[list[float], float]:
    """MTA eq. 8 for one span: vector and mass."""
    width = len(hidden[0])
    mass = math.fsum(weights[t] for t in range(start, end))
    if mass == 0:
        return [0.0] * width, 0.0
    return [math.fsum(weights[t] * hidden[t][d] for t in range(start, end)) / mass for d in range(width)], mass


# MTA


def dsa(documents: Sequence[tuple[Sequence[Vector], Sequence[Vector], Vector]]) -> tuple[float, float]:
    """(student cosines, teacher cosines, omega) of each document -> weighted sum of squares, sum of weights."""
    total = count = 0.0
    for student, teacher, omega in documents:
        for i in range(len(omega)):
            for j in range(len(omega)):
                if i != j:
                    total += omega[i] * omega[j] * (student[i][j] - teacher[i][j]) ** 2
                    count += omega[i] * omega[j]
    return total, count


def hid(documents: Sequence[tuple[Sequence[Vector], Sequence[Vector], Vector]]) -> tuple[float, float]:
    """(projected student, teacher, weights) of each document -> weighted sum of 1 - cos, sum of weights."""
    total = count = 0.0
    for student, teacher, weights in documents:
        for s, t, w in zip(student, teacher, weights, strict=True):
            total += w * (1 - cosine(s, t))
            count += w
    return total, count


# SRA


def omega(mass: Vector, p: float) -> list[float]:
    powers = [m**p for m in mass]
    return [x / math.fsum(powers) for x in powers]


def geometric(documents: Sequence[tuple[Sequence[Vector], Sequence[Vector], Vector]]) -> tuple[float, float]:
    """(student, teacher, omega) of each document -> sum, documents with a span."""
    total = 0.0
    for student, teacher, weights in documents:
        pairs = [(i, j) for i in range(len(weights)) for j in range(len(weights)) if i != j]
        norm = math.fsum(weights[i] * weights[j] for i, j in pairs)
        for i, j in pairs:
            gap = cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])
            total += weights[i] * weights[j] / norm * gap**2
    return total, sum(1.0 for _, _, w in documents if len(w))


def kl(p: Vector, q: Vector) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# Distributions


def tail_share(p: Vector, q: Vector, alpha: float) -> float:
    """The weight of reverse KL in the adaptive divergence."""
    running, tail, everything = 0.0, 0.0, 0.0
    for a, b in sorted(zip(p, q, strict=True)):
        running += a
        everything += abs(a - b)
        if running <= alpha:
            tail += abs(a - b)
    return tail / everything if everything else 0.5


def ab(p: Vector, q: Vector, a: float, b: float) -> float:
    """ABKD, with the powers of p and q."""
    terms = (a / (a + b) * x ** (a + b) + b / (a + b) * y ** (a + b) - x**a * y**b for x, y in zip(p, q, strict=True))
    return math.fsum(terms) / (a * b)


def csd(p: Vector, q: Vector) -> float:
    """A quarter of the squared differences of log q / p between two classes, one drawn from each distribution."""
    gaps = [math.log(y / x) for x, y in zip(p, q, strict=True)]
    mass = math.fsum(a * g * g for a, g in zip(q, gaps, strict=True)) + math.fsum(
        a * g * g for a, g in zip(p, gaps, strict=True)
    )
    means = [math.fsum(a * g for a, g in zip(side, gaps, strict=True)) for side in (q, p)]
    return (mass - 2 * means[0] * means[1]) / 4


def divergence(
    student: Vector, teacher: Vector, kind: str, tau: float, skew: float, alpha: float, share: float = 0.5
) -> float:
    q, p = softmax([x / tau for x in student]), softmax([x / tau for x in teacher])
    pairs = list(zip(p, q, strict=True))
    middle = [share * a + (1 - share) * b for a, b in pairs]
    if kind == "adaptive_kl":
        tail = tail_share(p, q, alpha)
        return (1 - tail) * kl(p, q) + tail * kl(q, p)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: share * kl(p, middle) + (1 - share) * kl(q, middle),
        "tvd": lambda: sum(abs(a - b) for a, b in pairs) / 2,
        "ab": lambda: ab(p, q, 0.2, 0.7),
        "csd": lambda: csd(p, q),
        "skewed_forward_kl": lambda: kl(p, [skew * a + (1 - skew) * b for a, b in pairs]),
        "skewed_reverse_kl": lambda: kl(q, [(1 - skew) * a + skew * b for a, b in pairs]),
    }[kind]()


def cross_entropy(logits: Sequence[Vector], targets: Sequence[int]) -> float:
    return -math.fsum(math.log(softmax(z)[y]) for z, y in zip(logits, targets, strict=True))
