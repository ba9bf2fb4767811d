"""What is stored instead of states: classes drawn of each prediction, and cosines of spans instead of their vectors.

Errors and bytes, not times, but for the draw itself. Distributions and documents are the pair's; with the demo, those
of a trained teacher. The draw with replacement is that of random-sampling distillation (arXiv 2503.16870).

Shape legend for this file
    N predictions    V classes    k drawn classes
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_size import CLASSES, WIDTH, counted, levels_of
from benchmarks.measure import Options, Result, Row, cost, interleaved, ratio
from benchmarks.pair import Pair, pair_of
from xkd_pipeline.capture.measure import draw_classes
from xkd_schemas.codecs import PLAIN
from xkd_schemas.signals import Signal, signal_bytes
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.models.measures import prediction_stats

DRAWS = (8, 16, 32)
MOST_WITH_REPLACEMENT = 400


def run(options: Options) -> list[Result]:
    """Errors at the same bytes, the cost of a draw, and bytes against those of states and vectors."""
    pair = pair_of(options)
    logits_NV = logits_of(pair, options.size(1024, 64))
    return [*errors(logits_NV), speed(logits_NV[:128], options.repeats), *sizes(pair)]


def logits_of(pair: Pair, number: int) -> Tensor:
    """The teacher's logits at so many predictions at most, float32, from its stored states and head."""
    from xkd_schemas.cache.table import names_in

    cache = Cache(pair.cache, student=names_in(pair.cache, "students")[0])
    head, found, missing = cache.head(), list[Tensor](), number
    for row in cache.usable[:: max(1, len(cache.usable) // 64)].tolist():
        batch = batch_of(cache, [row], frozenset({Signal("hidden_last")}))
        assert batch.teacher_hidden_BRD is not None
        hidden_MD = batch.teacher_hidden_BRD[0, batch.teacher_predict_BM[0]][:missing]
        found.append(head(hidden_MD.to(head.weight_VD.dtype)).float())
        missing -= len(hidden_MD)
        if missing <= 0:
            break
    return torch.cat(found)


def errors(logits_NV: Tensor) -> list[Row]:
    """Relative error of the estimated distributions, against draws with replacement that take as many bytes."""
    p_NV = logits_NV.double().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    u_N2 = torch.rand(len(p_NV), 2, generator=generator, dtype=torch.float64)
    most_Nm = torch.multinomial(p_NV, MOST_WITH_REPLACEMENT, replacement=True, generator=generator)
    rows = []
    for k in DRAWS:
        draw = draw_classes(logits_NV, u_N2, k)
        ours = float(np.sqrt(draw.lost_N.sum() / draw.kept_N.sum()))
        number = _as_many(most_Nm, k)
        counts_NV = torch.zeros_like(p_NV).scatter_add_(
            -1, most_Nm[:, :number], torch.ones(len(p_NV), number, dtype=torch.float64)
        )
        theirs = _relative(counts_NV / number, p_NV)
        what = (
            f"error of {k} drawn classes / of {number} draws with replacement, which are {k} different ones on average"
        )
        rows.append(ratio(what, ours, theirs, "of the probabilities"))
    top_Nk = p_NV.topk(DRAWS[1])
    kept_NV = torch.zeros_like(p_NV).scatter_(-1, top_Nk.indices, top_Nk.values / top_Nk.values.sum(-1, keepdim=True))
    biased, ours = _relative(kept_NV, p_NV), rows[1].ours
    what = f"error of {DRAWS[1]} drawn classes, 0 on average / of the {DRAWS[1]} largest, which stays"
    return [*rows, ratio(what, ours, biased, "of the probabilities")]


def _relative(estimate_NV: Tensor, p_NV: Tensor) -> float:
    return float(((estimate_NV - p_NV).square().sum() / p_NV.square().sum()).sqrt())


def _as_many(draws_Nm: Tensor, k: int) -> int:
    """How many draws with replacement are k different classes on average."""

    def different(number: int) -> float:
        sorted_Nm = draws_Nm[:, :number].sort(-1).values
        return 1.0 + float((sorted_Nm.diff(dim=-1) != 0).double().sum(-1).mean())

    return next((n for n in range(k, draws_Nm.shape[1] + 1) if different(n) >= k), draws_Nm.shape[1])


def speed(logits_NV: Tensor, repeats: int) -> Row:
    """A draw against the entropies and argmaxes of the same logits, which a capture makes anyway."""
    u_N2 = torch.rand(len(logits_NV), 2, dtype=torch.float64)
    calls: dict[str, Callable[[], object]] = {
        "draw": lambda: draw_classes(logits_NV, u_N2, DRAWS[1]),
        "stats": lambda: prediction_stats(logits_NV),
    }
    seconds = interleaved(calls, repeats)
    return cost(f"drawing {DRAWS[1]} classes / entropy and argmax", seconds["draw"], seconds["stats"])


def sizes(pair: Pair) -> list[Row]:
    """By the plan's arithmetic at width 4096, on the pair's documents and on one of 512 tokens with 159 phrases."""
    counts, documents = counted(pair)
    tokens = counts["T"]
    long = {"T": 512, "R": 512, "N": 511, "phrase K": 159, "phrase K(K-1)/2": 159 * 158 // 2}

    def bytes_of(*signals: Signal) -> float:
        return sum(signal_bytes(s, WIDTH, PLAIN, counts, documents) for s in signals) / tokens

    def of_levels(name: str) -> float:
        return bytes_of(*(Signal(name, *level) for level in levels_of(32)))

    def of_long(name: str) -> float:
        return sum(signal_bytes(Signal(name, n, "phrase"), WIDTH, PLAIN, long, 1) for n in range(4)) / long["T"]

    draws = bytes_of(Signal("sampled", top=DRAWS[1]), Signal("entropy"))
    state, geometry = bytes_of(Signal("hidden_last")), of_levels("span_geometry")
    at = f"D={WIDTH}, V={CLASSES // 1000}k"
    vectors, states = of_levels("span_vectors"), 2.0 * WIDTH * len(levels_of(32))
    return [
        ratio(what, ours, theirs, "bytes a token")
        for what, ours, theirs in (
            (f"{DRAWS[1]} drawn classes and entropy / last states, {at}", draws, state),
            (f"cosines of four layers' spans / their vectors, {at}", geometry, vectors),
            ("cosines of 159 phrases of 512 tokens, four layers / their vectors",
             of_long("span_geometry"), of_long("span_vectors")),
            (f"cosines of four layers' spans / states of those layers, {at}", geometry, states),
        )
    ]  # fmt: skip
