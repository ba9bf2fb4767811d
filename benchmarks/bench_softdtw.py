"""Soft-DTW, value and gradient of eight pairs of 256 tokens, against other packages and against itself."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Options, Result, Row, Skipped, cost, interleaved
from xkd_trainer.losses.softdtw import cosine_cost, soft_dtw

GAMMA = 1.0
WIDTH = 1024

Loss = Callable[[Tensor], Tensor]


def run(options: Options) -> list[Result]:
    """Peers, realistic costs, from states, and the error of float32."""
    pairs, length = options.size(8, 2), options.size(256, 32)
    costs = costs_of(pairs, length)
    results = against_peers(costs["uniform"], options.repeats)
    seconds = interleaved({n: _both_ways(ours, c) for n, c in costs.items()}, options.repeats)
    results += [
        cost(f"ours on {name} costs / on uniform ones", seconds[name], seconds["uniform"], bar=1.3)
        for name in costs
        if name != "uniform"
    ]
    results.append(_from_states(pairs, length, options.repeats))
    error, largest = max(gradient_error(cost_BST) for cost_BST in costs.values())
    what = "largest float32 gradient error, against float64"
    return [*results, Row(what=what, ratio=error, bar=1e-5, ours=error, theirs=largest, unit="(error, gradient)")]


def costs_of(pairs: int, length: int) -> dict[str, Tensor]:
    """Costs of different kinds [B, S, T]; "realistic" ones have cells far off the path, where gradients vanish."""
    generator = torch.Generator().manual_seed(0)
    x_BSE, y_BTE = states_of(pairs, length)
    squared_BST = torch.cdist(x_BSE, y_BTE).square()
    return {
        "uniform": torch.rand(pairs, length, length, generator=generator),
        "squared distance": squared_BST,
        "squared distance / width": squared_BST / WIDTH,
        "cosine": cosine_cost(x_BSE, y_BTE),
    }


def states_of(pairs: int, length: int) -> tuple[Tensor, Tensor]:
    """Two noisy views of the same slowly moving states, [B, S, E] each."""
    generator = torch.Generator().manual_seed(1)
    steps_BSE = torch.randn(pairs, length, WIDTH, generator=generator)
    path_BSE = steps_BSE.cumsum(1) / length**0.5
    noise = [torch.randn(pairs, length, WIDTH, generator=generator) for _ in range(2)]
    return path_BSE + noise[0], path_BSE + noise[1]


def gradient_error(cost_BST: Tensor) -> tuple[float, float]:
    """Largest difference between the float32 and the float64 gradient, and the largest gradient."""
    single_BST, double_BST = (_gradient(ours, c) for c in (cost_BST, cost_BST.double()))
    return float((single_BST - double_BST).abs().max()), float(double_BST.abs().max())


def ours(cost_BST: Tensor) -> Tensor:
    """The value of every pair, all of its tokens."""
    length_B = torch.full((cost_BST.shape[0],), cost_BST.shape[1])
    return soft_dtw(cost_BST, length_B, length_B, gamma=GAMMA)


def _gradient(loss: Loss, cost_BST: Tensor) -> Tensor:
    leaf_BST = cost_BST.detach().clone().requires_grad_()
    (gradient_BST,) = torch.autograd.grad(loss(leaf_BST).sum(), leaf_BST)
    return gradient_BST


def _both_ways(loss: Loss, cost_BST: Tensor) -> Callable[[], Tensor]:
    return lambda: _gradient(loss, cost_BST)


def peers_here() -> dict[str, Loss]:
    """Soft-DTW of other packages that are installed, from a given cost; it is copied, as one of them writes to it."""
    found: dict[str, Loss] = {}
    if importlib.util.find_spec("pysdtw"):
        import pysdtw

        theirs = pysdtw.SoftDTW(gamma=GAMMA, use_cuda=False, dist_func=lambda x, _y: x.clone())
        found["pysdtw"] = lambda cost_BST: theirs(cost_BST, cost_BST)
    if importlib.util.find_spec("tslearn"):
        from tslearn.metrics import SoftDTWLossPyTorch

        other = SoftDTWLossPyTorch(gamma=GAMMA, dist_func=lambda x, _y: x.clone())
        found["tslearn"] = lambda cost_BST: other(cost_BST, cost_BST)
    return found


def against_peers(cost_BST: Tensor, repeats: int) -> list[Result]:
    """How many times slower each peer is; skipped where it is not installed.

    A peer that computes something else is an error of this benchmark: its time would say nothing.
    """
    peers = peers_here()
    seconds = interleaved({n: _both_ways(f, cost_BST) for n, f in {"ours": ours, **peers}.items()}, repeats)
    results: list[Result] = []
    mine = _gradient(ours, cost_BST)
    for name in ("pysdtw", "tslearn"):
        what = f"{name} / ours, forward and backward"
        if name not in peers:
            results.append(Skipped(what=what, why=f"{name} is not installed; pip install -e '.[bench]'"))
            continue
        agrees = torch.allclose(_gradient(peers[name], cost_BST), mine, atol=1e-2)
        assert agrees, f"{name} computes something else: its time says nothing"
        slower = cost(what, seconds[name], seconds["ours"])
        results.append(replace(slower, bar=6.0, at_least=True))
    return results


def _from_states(pairs: int, length: int, repeats: int) -> Row:
    x_BSE, y_BTE = (s.requires_grad_() for s in states_of(pairs, length))
    upstream_BST = torch.rand(pairs, length, length)

    def whole() -> object:
        return torch.autograd.grad(ours(cosine_cost(x_BSE, y_BTE)).sum(), (x_BSE, y_BTE))

    def distance() -> object:
        return torch.autograd.grad(cosine_cost(x_BSE, y_BTE), (x_BSE, y_BTE), upstream_BST)

    seconds = interleaved({"whole": whole, "distance": distance}, repeats)
    what = f"from states of width {WIDTH} / the distance alone"
    return cost(what, seconds["whole"], seconds["distance"], bar=1.35)
