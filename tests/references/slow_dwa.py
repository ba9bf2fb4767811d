"""DWA-KD and soft-DTW as loops over the papers' equations, in Python floats: the definition that tests compare with.

Positions count from 1 in the comments, as in the papers, and from 0 in the code.
"""

import math
from collections.abc import Sequence

from slow_losses import cosine, softmax

Matrix = Sequence[Sequence[float]]
Row = Sequence[float]


def softmin(values: Row, gamma: float) -> float:
    """-gamma log sum exp(-a / gamma), with infinities."""
    least = min(values)
    if math.isinf(least):
        return least
    return least - gamma * math.log(sum(math.exp((least - value) / gamma) for value in values))


def soft_dtw(cost: Matrix, gamma: float) -> tuple[float, list[list[float]]]:
    """Value, and gradient by the recursion of Cuturi and Blondel on R and C (their algorithms 1 and 2)."""
    rows, columns = len(cost), len(cost[0]) if cost else 0
    if not rows or not columns:
        return 0.0, [[0.0] * columns for _ in cost]
    r = [[math.inf] * (columns + 1) for _ in range(rows + 1)]
    r[0][0] = 0.0
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            r[i][j] = cost[i - 1][j - 1] + softmin((r[i - 1][j], r[i][j - 1], r[i - 1][j - 1]), gamma)
    e = [[0.0] * (columns + 2) for _ in range(rows + 2)]
    e[rows][columns] = 1.0
    for i in range(rows, 0, -1):
        for j in range(columns, 0, -1):
            for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
                if a <= rows and b <= columns and not math.isinf(r[a][b]) and not math.isinf(r[i][j]):
                    e[i][j] += e[a][b] * math.exp((r[a][b] - r[i][j] - cost[a - 1][b - 1]) / gamma)
    return r[rows][columns], [row[1:-1] for row in e[1:-1]]


def cosine_cost(x: Matrix, y: Matrix) -> list[list[float]]:
    return [[1.0 - cosine(a, b) for b in y] for a in x]


def band(attention: Matrix, width: float, beta: float, mix: float, penalty: float) -> list[list[float]]:
    """lambda where |j - c_i| > b + beta H_i, positions from 1."""
    rows, columns = len(attention), len(attention[0])
    out = []
    for i, row in enumerate(attention, start=1):
        centre = mix * sum(j * a for j, a in enumerate(row, start=1)) + (1 - mix) * i * columns / rows
        entropy = -sum(a * math.log(a) for a in row if a > 0)
        out.append([penalty if abs(j - centre) > width + beta * entropy else 0.0 for j in range(1, columns + 1)])
    return out


def entropy(logits: Row) -> float:
    """Nats, at temperature 1."""
    return -sum(p * math.log(p) for p in softmax(logits) if p > 0)


def student_weights(entropies: Row, gates: Row, order: str) -> list[float]:
    """Eq. 11-12 for one document, scaled before or after the gate."""
    products = [h * g for h, g in zip(entropies, gates, strict=True)]
    scaled = products if order == "gate_before" else list(entropies)
    total = sum(scaled)
    if total == 0:
        return [0.0] * len(scaled)
    scaled = [x * len(scaled) / total for x in scaled]
    return scaled if order == "gate_before" else [x * g for x, g in zip(scaled, gates, strict=True)]


def teacher_weights(entropies: Row, vocab_size: int) -> list[float]:
    """Eq. 14 for one document."""
    raw = [min(1.0, max(0.0, 1.0 - h / math.log(vocab_size))) for h in entropies]
    return [x * len(raw) / sum(raw) for x in raw] if sum(raw) else [0.0] * len(raw)
