"""A table on its way: what counts as done, what is made again, and who may write."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damages import flip
from fake_stage import UNITS, build_all, opened
from faulty_disk import exit_code_of
from small_cache import files_of
from xkd_pipeline.tables.writer import locked
from xkd_schemas.cache.manifest import Plan, is_whole, read_record
from xkd_schemas.cache.table import Table
from xkd_schemas.console import run as run_app
from xkd_schemas.errors import BadData, Busy, InputMissing, Mismatch, Refused


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    build_all(tmp_path / "undisturbed")
    return files_of(tmp_path / "undisturbed")


def test_a_table_is_built_once_and_then_reused(tmp_path: Path) -> None:
    first, second = build_all(tmp_path), build_all(tmp_path)

    assert (first.made, first.kept, second.made, second.kept) == (UNITS, 0, 0, UNITS)
    assert second.manifest == first.manifest
    assert is_whole(first.manifest)
    rows = [f"u{unit}r{row}" for unit in range(UNITS) for row in range(unit % 3 + 1)]
    assert [row["doc_id"] for row in Table(tmp_path, "documents")] == rows


def test_a_table_that_documents_were_added_to_is_left_as_it_is(tmp_path: Path) -> None:
    build_all(tmp_path)
    path = tmp_path / "documents" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": 2, "min_reader": 2, "earlier": [{}]}))
    next((tmp_path / "documents").glob("00002-*.arrow")).unlink()
    before = path.read_bytes()

    with pytest.raises(Mismatch, match="documents were added"):
        build_all(tmp_path)
    assert path.read_bytes() == before


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(UNITS)))
def test_the_order_of_shards_changes_no_byte(tmp_path: Path, undisturbed: dict[str, bytes], order: list[int]) -> None:
    root = tmp_path / "-".join(map(str, order))

    build_all(root, order=order)

    assert files_of(root) == undisturbed


@pytest.mark.parametrize("trouble", ["error", "bug", "interrupt"])
def test_a_run_that_breaks_off_keeps_its_shards(tmp_path: Path, undisturbed: dict[str, bytes], trouble: str) -> None:
    root = tmp_path / "t"
    with pytest.raises((BadData, ZeroDivisionError, KeyboardInterrupt)):
        build_all(root, troubles={2: trouble})
    assert not (root / "documents" / "manifest.json").exists()

    built = build_all(root)

    assert (built.made, built.kept) == (3, 2)
    assert files_of(root) == undisturbed


DAMAGES: dict[str, Callable[[Path], None]] = {
    "shard flipped": lambda f: flip(next(f.glob("00001-*.arrow"))),
    "shard cut": lambda f: os.truncate(next(f.glob("00001-*.arrow")), 100),
    "shard empty": lambda f: os.truncate(next(f.glob("00001-*.arrow")), 0),
    "shard missing": lambda f: next(f.glob("00001-*.arrow")).unlink(),
    "shard swapped": lambda f: shutil.copy(next(f.glob("00002-*.arrow")), next(f.glob("00001-*.arrow"))),
    "record flipped": lambda f: flip(f / "commits" / "00001.json"),
    "record empty": lambda f: os.truncate(f / "commits" / "00001.json", 0),
    "record cut": lambda f: os.truncate(f / "commits" / "00001.json", 300),
    "record missing": lambda f: (f / "commits" / "00001.json").unlink(),
    "record of another unit": lambda f: shutil.copy(f / "commits" / "00002.json", f / "commits" / "00001.json"),
    "rejects flipped": lambda f: flip(next((f / "rejects").glob("*"))),
    "rejects missing": lambda f: next((f / "rejects").glob("*")).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_shard_is_set_aside_and_only_it_is_made_again(
    tmp_path: Path, undisturbed: dict[str, bytes], damage: str, sealed: bool
) -> None:
    root = tmp_path / "t"
    build_all(root)
    if not sealed:
        (root / "documents" / "manifest.json").unlink()
    DAMAGES[damage](root / "documents")

    built = build_all(root)

    assert (built.made, built.kept) == (1, UNITS - 1)
    assert files_of(root) == undisturbed
    if damage != "record missing":
        assert list((root / "documents" / "quarantine").glob("0000[01]*.json"))


def test_files_no_record_names_are_swept_away_at_the_seal(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    root = tmp_path / "t"
    folder = root / "documents"
    (folder / "rejects").mkdir(parents=True)
    (folder / "commits").mkdir()
    for name in ("00001-0123456789ab.arrow", ".tmp-9-ab", "commits/.tmp-9-ab", "rejects/00000-ab.jsonl"):
        (folder / name).write_bytes(b"of a worker that died")

    build_all(root)

    assert files_of(root) == undisturbed


def test_a_linked_shard_is_refused(tmp_path: Path) -> None:
    build_all(tmp_path)
    shard = next((tmp_path / "documents").glob("00001-*.arrow"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(Refused, match="is a symbolic link"):
        build_all(tmp_path)


def test_an_empty_plan_without_records_is_written_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    root = tmp_path / "t"
    (root / "documents").mkdir(parents=True)
    (root / "documents" / "plan.json").touch()

    build_all(root)

    assert files_of(root) == undisturbed


@pytest.mark.parametrize("content", [b"", b"null"])
def test_a_plan_of_which_nothing_is_left_is_bad_data_and_never_a_mismatch(tmp_path: Path, content: bytes) -> None:
    build_all(tmp_path)
    (tmp_path / "documents" / "plan.json").write_bytes(content)

    with pytest.raises(BadData, match=r"plan.json cannot be read as plan: .* Next: xkd-cache repair"):
        opened(tmp_path, spec={"seed": 2})
    (tmp_path / "documents" / "manifest.json").unlink()
    with pytest.raises(BadData, match=r"plan.json cannot be read as plan: .* Next: run the xkd-cache command"):
        opened(tmp_path)


@pytest.mark.parametrize("sealed", [True, False])
def test_the_command_that_wrote_a_plan_repairs_it(tmp_path: Path, undisturbed: dict[str, bytes], sealed: bool) -> None:
    root = tmp_path / "t"
    if sealed:
        build_all(root)
    else:
        with pytest.raises(BadData):
            build_all(root, troubles={2: "error"})
    plan = root / "documents" / "plan.json"
    whole = plan.read_bytes()
    kept = len(list(plan.parent.glob("commits/*.json")))
    for at in range(0, len(whole), 5):
        plan.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        with contextlib.suppress(BadData):
            read_record(plan, Plan)
        opened(root)
        assert plan.read_bytes() == whole
    plan.write_bytes(whole[: len(whole) // 2])

    built = build_all(root)

    assert built.kept == kept
    assert files_of(root) == undisturbed


def test_a_damaged_plan_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    build_all(tmp_path)
    plan = tmp_path / "documents" / "plan.json"
    plan.write_bytes(plan.read_bytes()[:-20])
    damaged = plan.read_bytes()

    with pytest.raises(BadData, match="cannot be read as plan"):
        opened(tmp_path, spec={"seed": 2, "parser": {"name": "b"}})

    assert plan.read_bytes() == damaged


def test_a_plan_written_before_plans_had_digests_is_read(tmp_path: Path) -> None:
    build_all(tmp_path)
    plan = tmp_path / "documents" / "plan.json"
    data = json.loads(plan.read_bytes())
    del data["digest"]
    plan.write_bytes((json.dumps(data, sort_keys=True, indent=1) + "\n").encode())
    before = files_of(tmp_path)

    assert build_all(tmp_path).kept == UNITS
    changed = {name for name, content in files_of(tmp_path).items() if before[name] != content}
    assert changed == {"SHA256SUMS"}


def test_a_missing_plan_is_written_again_where_the_manifest_vouches_for_it(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    build_all(tmp_path / "t")
    plan = tmp_path / "t" / "documents" / "plan.json"
    plan.unlink()

    with pytest.raises(InputMissing, match=r"plan.json is not there"):
        opened(tmp_path / "t", spec={"seed": 2})
    assert build_all(tmp_path / "t").made == 0
    assert files_of(tmp_path / "t") == undisturbed
    plan.unlink()
    (tmp_path / "t" / "documents" / "manifest.json").unlink()
    with pytest.raises(InputMissing, match=r"plan.json is not there"):
        opened(tmp_path / "t")


def test_other_shards_are_bad_data(tmp_path: Path) -> None:
    build_all(tmp_path)

    with pytest.raises(BadData, match="lists other shards than this corpus gives"):
        opened(tmp_path, units=UNITS + 1)


def test_a_second_writer_is_told_who_has_the_cache_until_that_process_dies(tmp_path: Path) -> None:
    def die() -> None:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        locked(tmp_path),
        pytest.raises(Busy, match=rf"written by pid {os.getpid()} on .*Next: wait for it"),
        locked(tmp_path),
    ):
        pass
    assert exit_code_of(die) == -signal.SIGKILL
    with pytest.raises(BadData), locked(tmp_path):
        raise BadData("it is free after an error, and its file stays")
    assert (tmp_path / "LOCK").exists()
    with locked(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / "LOCK").read_text()


def test_an_interruption_says_how_many_shards_were_kept_and_what_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_app("xkd-cache", lambda **_: build_all(tmp_path, troubles={2: "interrupt"}))
    assert caught.value.code == 130
    kept = f"Kept: 2 of {UNITS} shards of documents (3 documents); lost: what was done of the shards in work"
    assert kept in capsys.readouterr().err
