"""Names of content: sha256 of JSON that is written one way only."""

import hashlib
import json
from typing import Any

Json = Any


def canonical(value: Json) -> bytes:
    """JSON with sorted keys, no blanks and no NaN: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def digest(value: Json) -> str:
    """Hex sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()
