"""The door to the disk: whole or not at all, and never outside the folder."""

import errno
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import faulty_disk
from xkd_schemas.durable_files import (
    disk_errors,
    inside,
    own_folder,
    put_if_absent,
    remove_ownerless,
    replace,
    save_folder,
    sha256_of,
    xxh3_of,
)
from xkd_schemas.errors import DiskFailed, Refused


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", "/etc", ".hidden", "a\0b", "a b", "x" * 129, "a\n"])
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="is not a plain file name"):
        inside(tmp_path, "fine", name)


@pytest.mark.parametrize("names", [("folder", "file"), ("real", "link")])
def test_a_symbolic_link_is_refused_wherever_it_leads(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "link").symlink_to(tmp_path / "real" / "file")

    with pytest.raises(Refused, match=r"/(folder|real/link) is a symbolic link"):
        inside(tmp_path, *names)


def test_of_many_writers_of_one_record_one_wins_and_its_content_stays(tmp_path: Path) -> None:
    target, wins, start = tmp_path / "commits" / "00000.json", [], threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if put_if_absent(target, b"%d" % number * 1000):
            wins.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))

    assert len(wins) == 1
    assert target.read_bytes() == b"%d" % wins[0] * 1000
    assert [path.name for path in target.parent.iterdir()] == ["00000.json"]


@pytest.mark.parametrize("write", [replace, put_if_absent])
def test_a_failed_or_interrupted_write_leaves_only_the_old_file(tmp_path: Path, monkeypatch, write) -> None:
    target = tmp_path / "m"
    if write is replace:
        target.write_bytes(b"old")

    errors: list[BaseException] = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]

    def fail(_descriptor: int) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFailed, match=r"m: No space left on device\. Kept: everything committed before"):
        write(target, b"new")
    with pytest.raises(KeyboardInterrupt):
        write(target, b"new")

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"m": b"old"} if write is replace else {})


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable"), (errno.EIO, "look at the disk")],
)
def test_what_is_to_be_done_fits_what_the_disk_says(tmp_path: Path, number: int, advice: str) -> None:
    with pytest.raises(DiskFailed) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))

    assert caught.value.fix == f"{advice}, run again"


def test_only_trouble_with_the_disk_becomes_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), disk_errors(tmp_path):
        raise ValueError("mine")


def test_digests_are_those_of_the_public_algorithms(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")

    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert xxh3_of(b"abc") == xxh3_of(memoryview(b"abc")) == "78af5f94892f3950"


def test_a_folder_that_a_dying_writer_left_half_saved_is_cleared_by_the_next(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        for name in ("a.json", "b.json"):
            (folder / name).write_text(name)

    with faulty_disk.injected("*:0:count") as fault:
        save_folder(tmp_path / "undisturbed", save)
    for at in range(1, fault.seen + 1):
        child = os.fork()
        if child == 0:
            with faulty_disk.injected(f"*:{at}:kill"):
                save_folder(tmp_path / f"{at}", save)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        save_folder(tmp_path / f"{at}", save)
        assert sorted(path.name for path in (tmp_path / f"{at}").iterdir()) == ["a.json", "b.json"]


def test_a_folder_stays_while_its_process_lives_and_goes_after_it_was_killed(tmp_path: Path) -> None:
    def die() -> None:
        with own_folder(tmp_path, ".tmp-x-") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with own_folder(tmp_path, ".tmp-x-") as first, own_folder(tmp_path, ".tmp-x-") as second:
        remove_ownerless(tmp_path, ".tmp-x-")
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []
    assert faulty_disk.exit_code_of(die) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-x-*/half"))) == 1
    remove_ownerless(tmp_path, ".tmp-x-")
    assert list(tmp_path.iterdir()) == []


def test_links_and_other_names_and_other_users_folders_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("elsewhere", ".tmp-y-1", ".tmp-x-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-x-link").symlink_to("elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: 12345)
        remove_ownerless(tmp_path, ".tmp-x-")
    assert (tmp_path / ".tmp-x-1").is_dir()
    remove_ownerless(tmp_path, ".tmp-x-")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", ".tmp-y-1", ".tmp-x-link"}


def test_a_folder_that_was_renamed_stays(tmp_path: Path) -> None:
    with own_folder(tmp_path, ".tmp-x-") as folder:
        folder.rename(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
