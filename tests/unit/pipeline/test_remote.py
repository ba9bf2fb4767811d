"""Corpora at addresses, with a store in memory: the rows of the file, or one line that says what is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations import memory

import small_cache
from small_cache import made
from xkd_schemas.cache.table import Table
from xkd_schemas.corpus.sources import open_source
from xkd_schemas.errors import InputMissing, UsageError, XkdError


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def test_rows_at_an_address_are_those_of_the_file(tmp_path: Path, store: Any) -> None:
    corpus = small_cache.write_rows(tmp_path / "corpus.jsonl", small_cache.corpus_rows())
    store.pipe_file("/bucket/corpus.jsonl", corpus.read_bytes())
    here, there = open_source(str(corpus), columns={}), open_source("memory://bucket/corpus.jsonl", columns={})

    assert list(there.rows(3)) == list(here.rows(3))
    assert (there.digest, there.form, there.num_rows) == (here.digest, here.form, here.num_rows)
    assert there.name == "memory://bucket/corpus.jsonl"
    assert "bytes copied here" in there.describe()


def test_documents_of_an_address_have_the_same_bytes(tmp_path: Path, store: Any) -> None:
    store.pipe_file("/bucket/corpus.jsonl", (made() / "corpus.jsonl").read_bytes())
    run = small_cache.run_file(tmp_path / "cache", documents={"corpus": ["memory://bucket/corpus.jsonl"]})
    small_cache.documents_stage(run, small_cache.IN_PROCESS)

    assert Table(tmp_path / "cache", "documents").manifest.root == Table(made() / "cache", "documents").manifest.root


@pytest.mark.parametrize(
    ("url", "kind", "match"),
    [
        ("memory://bucket/none.jsonl", InputMissing, "is not a file there"),
        ("memory://bucket/none.txt", UsageError, "unknown file extension"),
        ("nosuch://a/b.jsonl", UsageError, "check the beginning of the address"),
    ],
)
def test_addresses_that_give_nothing_say_so(url: str, kind: type[XkdError], match: str) -> None:
    with pytest.raises(kind, match=match):
        open_source(url, columns={})


@pytest.mark.parametrize(
    ("kind", "method", "raised", "said"),
    [
        (memory.MemoryFileSystem, "isfile", RuntimeError("no credentials\nfound"), "no credentials found"),
        (memory.MemoryFile, "read", ConnectionResetError("gone"), "gone"),
    ],
)
def test_what_a_stores_own_library_raises_is_one_line_and_a_lost_connection_no_disk_error(
    store: Any, monkeypatch: pytest.MonkeyPatch, kind: type, method: str, raised: Exception, said: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise raised

    store.pipe_file("/bucket/lost.jsonl", b"{}")
    monkeypatch.setattr(kind, method, fails)
    with pytest.raises(InputMissing, match=rf"memory://bucket/lost\.jsonl: {said}"):
        open_source("memory://bucket/lost.jsonl", columns={})


def test_no_password_is_shown() -> None:
    with pytest.raises(XkdError) as caught:
        open_source("nosuch://me:secret@host/b.jsonl?token=hidden", columns={})
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
