"""Corpora and caches at addresses, with a store in memory; what arrives wrong is refused, and nothing half is left."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import faulty_disk
import small_cache
from small_cache import made
from xkd_pipeline.corpus import open_source
from xkd_pipeline.fetch import fetch
from xkd_pipeline.remote import is_url, parsed_sums, publish
from xkd_pipeline.store import locked
from xkd_schemas.errors import BadData, Busy, DiskFailed, InputMissing, Mismatch, Refused, UsageError, XkdError
from xkd_schemas.table import Table

URL = "memory://bucket/cache"


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def test_a_published_cache_comes_back_byte_for_byte(tmp_path: Path) -> None:
    publish(made() / "cache", URL)
    fetch(URL, tmp_path / "back")

    assert small_cache.files_of(tmp_path / "back") == small_cache.files_of(made() / "cache")
    assert len(Table(tmp_path / "back", "students/S")) == 12
    publish(made() / "cache", URL)  # again: the same cache is no conflict


def test_the_manifests_and_then_the_list_go_last(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    plain = type(store)._open

    def noted(self: Any, path: str, mode: str = "rb", **rest: Any) -> Any:
        if "w" in mode:
            written.append(path)
        return plain(self, path, mode, **rest)

    monkeypatch.setattr(type(store), "_open", noted)
    publish(made() / "cache", URL)

    assert written[-1].endswith("SHA256SUMS")
    assert all(path.endswith("manifest.json") for path in written[-4:-1])
    assert not any(path.endswith("manifest.json") for path in written[:-4])


def test_another_cache_at_the_address_is_not_overwritten(store: Any) -> None:
    store.pipe_file("/bucket/cache/SHA256SUMS", b"other")

    with pytest.raises(Mismatch, match="holds another cache"):
        publish(made() / "cache", URL)
    assert store.cat_file("/bucket/cache/SHA256SUMS") == b"other"


def test_a_cache_that_changed_since_it_was_sealed_is_not_published(tmp_path: Path, store: Any) -> None:
    cache = small_cache.copied(tmp_path)
    shard = next((cache / "documents").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")

    with pytest.raises(BadData, match="is not what SHA256SUMS says"):
        publish(cache, URL)
    assert not any("SHA256SUMS" in path or "manifest" in path for path in store.store)


def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path, store: Any) -> None:
    publish(made() / "cache", URL)
    for path in [p for p in list(store.store) if not p.endswith("SHA256SUMS")][::4]:
        good = store.cat_file(path)
        store.pipe_file(path, bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(BadData, match=r"is not what SHA256SUMS says.*Kept: what arrived whole"):
            fetch(URL, tmp_path / "back")
        shutil.rmtree(tmp_path / ".back.fetching")
        store.pipe_file(path, good)
    store.rm_file("/bucket/cache/documents/plan.json")
    with pytest.raises(InputMissing, match="bucket/cache"):
        fetch(URL, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_fetch_that_lost_its_connection_goes_on_with_what_arrived(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(made() / "cache", URL)
    whole, opened, plain = small_cache.files_of(made() / "cache"), list[str](), type(store)._open

    def breaking(self: Any, path: str, *args: Any, **rest: Any) -> Any:
        opened.append(path)
        if len(opened) == 12:
            raise ConnectionResetError("gone")
        return plain(self, path, *args, **rest)

    monkeypatch.setattr(type(store), "_open", breaking)
    with pytest.raises(InputMissing, match=r"gone.*the same command goes on"):
        fetch(URL, tmp_path / "back")
    (tmp_path / ".back.fetching" / "stray").write_bytes(b"of another cache")
    arrived = next((tmp_path / ".back.fetching/documents").glob("*.arrow"))
    arrived.write_bytes(arrived.read_bytes()[:-1])

    assert fetch(URL, tmp_path / "back")["kept"] == 10
    assert small_cache.files_of(tmp_path / "back") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_two_fetches_to_one_folder_are_told_apart(tmp_path: Path) -> None:
    publish(made() / "cache", URL)
    with locked(tmp_path / ".back.fetching"), pytest.raises(Busy):
        fetch(URL, tmp_path / "back")


@pytest.mark.parametrize("action", ["kill", "cut"])
def test_a_fetch_that_dies_at_any_moment_is_whole_the_next_time(tmp_path: Path, action: str) -> None:
    publish(made() / "cache", URL)
    whole = small_cache.files_of(made() / "cache")
    with faulty_disk.injected("*:0:count") as fault:
        fetch(URL, tmp_path / "undisturbed")
    for at in range(1, fault.seen + 1, 1 + fault.seen // 12):
        folder = tmp_path / f"{at}"
        child = os.fork()
        if child == 0:
            with faulty_disk.injected(f"*:{at}:{action}"):
                fetch(URL, folder)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not folder.exists():
            fetch(URL, folder)
        assert small_cache.files_of(folder) == whole, fault.points[at - 1]


@pytest.mark.parametrize("action", ["ENOSPC", "ENOSPC+", "EIO"])
def test_a_fetch_on_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(tmp_path: Path, action: str) -> None:
    publish(made() / "cache", URL)
    whole = small_cache.files_of(made() / "cache")
    with faulty_disk.injected("*:0:count") as fault:
        fetch(URL, tmp_path / "undisturbed")
    for at in range(1, fault.seen + 1, 1 + fault.seen // 24):
        folder, partial = tmp_path / f"{at}", tmp_path / f".{at}.fetching"
        with faulty_disk.injected(f"*:{at}:{action}"), pytest.raises(DiskFailed) as caught:
            fetch(URL, folder)
        assert caught.value.exit_code == 74
        if not folder.exists():
            others = ("LOCK", "SHA256SUMS", ".tmp-")
            arrived = [p for p in partial.rglob("*") if p.is_file() and not p.name.startswith(others)]
            if arrived and fault.points[at - 1 :] != fault.points[-2:]:  # the last rename is all that is left
                assert f"what arrived whole, in {partial}; the same command goes on" in caught.value.kept
            assert fetch(URL, folder)["kept"] == len(arrived), fault.points[at - 1]
        assert small_cache.files_of(folder) == whole, fault.points[at - 1]


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../out", "a//b", ".hidden", "a\\b", "a/./b", "x" * 200])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, store: Any, name: str) -> None:
    store.pipe_file("/bucket/cache/SHA256SUMS", f"{'0' * 64}  {name}\n".encode())

    with pytest.raises(Refused, match="is not a plain file name"):
        fetch(URL, tmp_path / "deep" / "back")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("content", [b"no digest\n", b"0" * 64 + b" one\n", (b"0" * 64 + b"  one\n") * 2])
def test_a_broken_list_is_bad_data(content: bytes) -> None:
    with pytest.raises(BadData, match=r"line [12] is no digest and new name"):
        parsed_sums(content, "x")


def test_a_folder_that_holds_something_is_not_fetched_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="is there and not empty"):
        fetch(URL, tmp_path)


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
        ("memory://bucket/none.txt", UsageError, "the ending says no format"),
        ("nosuch://a/b.jsonl", UsageError, "check the beginning of the address"),
    ],
)
def test_addresses_that_give_nothing_say_so(url: str, kind: type[XkdError], match: str) -> None:
    with pytest.raises(kind, match=match):
        open_source(url, columns={})


def test_an_address_without_a_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="memory://bucket/cache holds no SHA256SUMS, so no published cache"):
        fetch(URL, tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_what_a_stores_own_library_raises_is_one_line(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("no credentials\nfound")

    monkeypatch.setattr(type(store), "exists", refused)
    with pytest.raises(InputMissing, match="memory://bucket/cache: no credentials found"):
        fetch(URL, tmp_path / "back")


def test_no_password_is_shown() -> None:
    with pytest.raises(XkdError) as caught:
        open_source("nosuch://me:secret@host/b.jsonl?token=hidden", columns={})
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "C:\\x.jsonl", "owner/name:train", "/a//b.jsonl", "x:y"])
def test_paths_are_no_addresses(name: str) -> None:
    assert not is_url(name)


@pytest.mark.parametrize("synced", [True, False])
def test_a_finished_fetch_survives_a_power_cut_because_it_syncs(tmp_path: Path, synced: bool) -> None:
    publish(made() / "cache", URL)
    with faulty_disk.injected("*:0:cut", synced=synced) as fault:
        fetch(URL, tmp_path / "back")
        fault.journal.cut(None)
    back = small_cache.files_of(tmp_path / "back") if (tmp_path / "back").is_dir() else {}
    assert (back == small_cache.files_of(made() / "cache")) is synced
