"""Tokens per second of a student that reads several documents in one row, against one row for each document.

The demo's student on batches of the demo's size, cross-entropy alone: forward, backward and update.
"""

from benchmarks.bench_step import Step
from benchmarks.measure import Options, Result, interleaved, ratio
from benchmarks.pair import pair_of


def run(options: Options) -> list[Result]:
    """Packed against padded, on the same documents."""
    pair, documents = pair_of(options), options.size(16, 4)
    steps = {packing: Step(pair, "ce", documents, packing=packing) for packing in (True, False)}
    times = interleaved({str(packing): step for packing, step in steps.items()}, options.repeats)
    tokens = int(steps[False].batch.student_valid_BS.sum())
    padded = steps[False].batch.student_valid_BS.numel()
    what = f"CE step packed / padded, {documents} documents of {tokens} tokens, {padded} with padding"
    return [ratio(what, tokens / times["True"], tokens / times["False"], "tokens/s", at_least=True)]
