"""Plans, records, manifests and shards with bytes put in, left out or replaced: found, and never a traceback."""

import os
import random
from pathlib import Path

import pytest

import small_cache
from damages import outcome, read_all
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.tables.dataset_card import table_states

ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))
PIECES = (
    b"",
    b"{",
    b"null",
    b"NaN",
    b"1e999",
    b'"\\ud800"',
    b"\xff",
    b"\0",
    b"[" * 5000,
    b"-1",
    b"9" * 5000,
    b'"../x"',
)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A stretch of the content replaced by a piece, by a copy of another stretch, or by nothing."""
    first, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    end = min(end, first + chance.choice((0, 1, 8, 200)))
    other = chance.randrange(len(content))
    piece = chance.choice((*PIECES, content[other : other + chance.choice((1, 16, 300))]))
    return content[:first] + piece + content[end:]


@pytest.mark.parametrize(
    "pattern", ["plan.json", "manifest.json", "0*.json", "*.arrow", "SHA256SUMS", "tokenizer.json"]
)
def test_no_reader_meets_other_bytes_with_a_traceback(tmp_path: Path, pattern: str) -> None:
    cache, chance = small_cache.copied(tmp_path), random.Random(SEED)
    paths = sorted(cache.rglob(pattern))
    for _ in range(3 * ROUNDS):
        path = chance.choice(paths)
        content = path.read_bytes()
        changed = mutated(content, chance)
        if changed == content:
            continue
        path.write_bytes(changed)
        assert outcome(lambda: verify(cache, "full")) == "found", (path, changed[:200])
        for look in (table_states, read_all):
            said = outcome(lambda look=look: look(cache))
            assert not said.startswith("crash"), (path, said)
        path.write_bytes(content)
    assert verify(cache, "full") == []
