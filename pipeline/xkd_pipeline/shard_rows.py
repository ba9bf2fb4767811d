"""How many rows a shard gets where nobody says it: as many as a teacher reads in about a minute.

A shard is what an interruption can lose. The number is decided once, when the documents' plan is made, from the
length of the rows, the teacher if one is named, and the hardware that is seen; afterwards the plan has it.
"""

import contextlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from xkd_pipeline.capture.artifacts import sizes_of
from xkd_schemas.cache.manifest import Plan, read_record
from xkd_schemas.config import RunConfig
from xkd_schemas.corpus.sources import Source, read_documents
from xkd_schemas.errors import BadData, InputMissing, XkdError
from xkd_trainer.models.compute_dtype import this_device

SECONDS: Final = 60
FLOPS: Final = {"cpu": 50e9, "cuda": 100e12}
"""What a core and a GPU may do in a second of a teacher's pass; of either there are slower and faster ones."""
USUAL_WEIGHTS: Final = {"cpu": 200e6, "cuda": 7e9}
"""Of a teacher that nobody has named yet."""
CHARS_PER_TOKEN: Final = 4
MOST_CHARS: Final = 400_000
"""Of a shard, which lies in memory while it is made."""
PLACES: Final = 4
ROWS_AT_A_PLACE: Final = 64


def rows_per_shard(run: RunConfig, sources: Sequence[Source]) -> tuple[int, str]:
    """Rows of a shard, and why it is so many where that is decided now: "" where run file or plan have it."""
    if run.documents.rows_per_shard:
        return run.documents.rows_per_shard, ""
    with contextlib.suppress(InputMissing, BadData):
        return int(read_record(Path(run.cache) / "documents" / "plan.json", Plan).spec["rows_per_shard"]), ""
    device = this_device()
    weights, whose = _weights(run, device)
    flops = FLOPS[device] * (run.teacher.threads if device == "cpu" else 1)
    chars = min(MOST_CHARS, round(SECONDS * flops / (2 * weights)) * CHARS_PER_TOKEN)
    rows = max(1, int(chars / max(1.0, *(_mean_chars(source, run.documents.max_chars) for source in sources))))
    about = f"about {chars:,} characters, which {whose} of {weights / 1e9:.2g} billion weights reads in a minute"
    return rows, f"{about} or less on this {'CPU' if device == 'cpu' else 'GPU'}"


def _weights(run: RunConfig, device: str) -> tuple[float, str]:
    """Weights of the teacher, and what to call it."""
    if run.teacher.model:
        with contextlib.suppress(XkdError):  # said by the stage that needs it
            return float(sizes_of(run.teacher.model).weights), "the teacher"
    return USUAL_WEIGHTS[device], "a teacher"


def _mean_chars(source: Source, max_chars: int) -> float:
    """Mean length of a row, at the place of the source where rows are longest."""
    found = [0.0]
    for place in range(PLACES):
        rows = list(islice(source.rows(place * source.num_rows // PLACES), ROWS_AT_A_PLACE))
        documents, _ = read_documents(source.name, source.form, source.columns, rows, max_chars=max_chars)
        found.append(sum(len(document.text) for document in documents) / max(1, len(rows)))
    return max(found)
