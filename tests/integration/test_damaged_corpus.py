"""Corpus files with flipped bits and cuts: rows or a one-line error, and no end of the process."""

import gzip
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from damages import ROUNDS, SEED, flipped
from faulty_disk import exit_code_of
from small_cache import corpus_rows
from xkd_schemas.corpus.sources import open_source, read_documents
from xkd_schemas.errors import XkdError

ROWS = 40


def files(folder: Path) -> list[Path]:
    rows = corpus_rows(ROWS)
    table = pa.Table.from_pylist(rows)
    lines = "".join(f'{{"prompt": "{row["prompt"]}", "response": "{row["response"]}"}}\n' for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    pq.write_table(table, folder / "a.parquet")
    pq.write_table(table, folder / "b.parquet", compression="none", use_dictionary=False)
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(folder / "b.arrow", table.schema) as stream:
        stream.write_table(table)
    return sorted(folder.iterdir())


def read(path: Path) -> str:
    """How reading ends; every row that a source counts must be a document or a reject."""
    try:
        source = open_source(str(path), columns={})
        rows = list(source.rows())
        documents, rejects = read_documents(source.name, source.form, source.columns, rows)
    except XkdError as error:
        return "two lines" if "\n" in str(error) else f"exit {error.exit_code}"
    assert len(documents) + len(rejects) == source.num_rows == len(rows)
    return "rows"


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.parquet", "a.arrow", "b.arrow"]
)
def test_nothing_ends_but_with_rows_or_one_line_and_nothing_ends_the_process(tmp_path: Path, name: str) -> None:
    """A copy of this process reads, so that its end would be seen."""
    files(tmp_path)
    path, chance = tmp_path / name, random.Random(SEED)
    content = path.read_bytes()

    def damage_and_read() -> None:
        found = set()
        for number in range(10 * ROUNDS):
            changed = content[: chance.randrange(len(content))]
            if number % 4:
                changed = flipped(content, chance.randrange(8 * len(content)))
            path.write_bytes(changed)
            found.add(read(path))
        assert found <= {"rows", "exit 2", "exit 65", "exit 77", "exit 78"}, found
        assert len(found) > 1 or name == "a.jsonl"

    assert exit_code_of(damage_and_read) == 0
