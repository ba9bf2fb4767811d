"""The README.md inside a cache: what it holds, and the lines that let `datasets.load_dataset` open it."""

import contextlib
from pathlib import Path

from xkd_schemas.errors import BadData
from xkd_schemas.manifest import Manifest, read_record


def readme(root: Path) -> str:
    """Text of the card for the tables that are sealed below `root`; one whose manifest is damaged is left out."""
    manifests: list[Manifest] = []
    for pattern in ("documents", "students/*", "teachers/*"):
        for path in sorted(root.glob(f"{pattern}/manifest.json")):
            with contextlib.suppress(BadData):
                manifests.append(read_record(path, Manifest))
    configs = "".join(
        f"- config_name: {m.table.replace('/', '-')}\n  data_files: {m.table}/*.arrow\n"
        + ("  default: true\n" if m.table == "documents" else "")
        for m in manifests
    )
    rows = "".join(
        f"| {m.table} | {m.rows} | {len(m.commits)} | {sum(c.size for c in m.commits):,} | `{m.root[:16]}` |\n"
        for m in manifests
    )
    return (
        f"---\nconfigs:\n{configs}---\n\n# XKD cache\n\n"
        "What a teacher model knew about a corpus, kept so that students can be trained without the teacher.\n\n"
        f"| table | documents | shards | bytes | root |\n|---|---|---|---|---|\n{rows}\n"
        "`sha256sum -c SHA256SUMS` checks every file. `load_dataset(FOLDER, CONFIG)` of Hugging Face datasets\n"
        "opens a table; `xkd-train --shards FOLDER` trains from it. Each table's settings are in its plan.json.\n"
    )
