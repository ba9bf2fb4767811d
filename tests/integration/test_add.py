"""A cache that was added to: the old bytes as they were, the union trained on, every command at home in it."""

from pathlib import Path

import small_cache
from small_cache import IN_PROCESS, corpus_rows, files_of, write_rows
from xkd_pipeline.add import Added, More, take_in
from xkd_pipeline.corpus import open_source
from xkd_pipeline.spans import ParserSettings
from xkd_pipeline.verify import verify
from xkd_schemas.table import Table

MORE = More(parser=ParserSettings(model=small_cache.SPACY))


def more_rows(folder: Path, count: int = 7, first: int = 100) -> Path:
    rows = [row | {"prompt": f"{first + n}. {row['prompt']}"} for n, row in enumerate(corpus_rows(count))]
    return write_rows(folder / f"more{first}.jsonl", rows)


def grown(cache: Path, corpus: Path, *models: Path) -> Added:
    said: list[str] = []
    return take_in(
        cache, [open_source(str(corpus), columns={})], MORE, [str(m) for m in models], IN_PROCESS, said.append
    )


def test_more_documents(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)

    added = grown(cache, more_rows(tmp_path), small_cache.made() / "teacher")

    assert added.commands == []
    assert {name: b.made for name, b in added.built.items()} == {"documents": 2, "teachers/T": 2, "students/S": 2}
    after = files_of(cache)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"README.md", "SHA256SUMS", *(f"{t}/manifest.json" for t in added.built)}
    assert [len(Table(cache, t)) for t in added.built] == [19, 19, 19]
    assert verify(cache, "deep") == []
