"""Flipped bits, cuts, swapped, missing, doubled, mutated and hostile files: each is found by name, no traceback."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import small_cache
from damages import ROUNDS, SEED, cuts, flips, outcome, read_all, resealed, resigned
from small_cache import files_of
from xkd_pipeline.maintain import verify_rows
from xkd_pipeline.maintain.gc import collect
from xkd_pipeline.maintain.repair import repair
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.tables.dataset_card import table_states
from xkd_pipeline.workers.contract import Workers


def shards(table: Path) -> list[Path]:
    return sorted(table.glob("0*.arrow"))


def test_no_flipped_bit_is_silent_and_none_crashes(tmp_path: Path) -> None:
    assert flips(small_cache.copied(tmp_path), 10 * ROUNDS, SEED) == {"found"}


def test_a_list_of_digests_with_another_line_end_is_found_and_names_outside_are_refused(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    content = (cache / "SHA256SUMS").read_bytes()
    for changed in (content[:-1] + b"\x0b", content[:-1]):
        (cache / "SHA256SUMS").write_bytes(changed)
        assert {one.file for one in verify(cache, "quick")} == {"SHA256SUMS"}
    (cache / "SHA256SUMS").write_bytes(content.replace(b"\n", b"\x0b", 1))
    assert any("names no file of a cache" in one.reason for one in verify(cache, "quick"))


def test_no_cut_file_is_silent_and_none_crashes(tmp_path: Path) -> None:
    assert cuts(small_cache.copied(tmp_path), 12 * 8192 // ROUNDS) == {"found"}


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "swapped": (lambda table: swap(*shards(table)[:2]), {0, 1}),
    "missing": (lambda table: shards(table)[1].unlink(), {1}),
    "doubled": (lambda table: shutil.copy(*shards(table)[:2]), {1}),
    "no record": (lambda table: (table / "commits/00002.json").unlink(), {2}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_bad_unit_is_named(tmp_path: Path, damage: str) -> None:
    cache = small_cache.copied(tmp_path)
    change, units = DAMAGES[damage]
    change(cache / "teachers/T")
    assert {one.unit for one in verify(cache, "full") if one.table == "teachers/T"} == units


def test_a_name_in_the_list_of_digests_that_no_cache_has_is_repaired(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    for name in ("../x", "/etc/passwd", "documents/plan,json"):
        (cache / "SHA256SUMS").write_bytes(before["SHA256SUMS"] + f"{'0' * 64}  {name}\n".encode())

        assert [(one.file, one.table) for one in verify(cache, "quick")] == [("SHA256SUMS", "")]
        assert repair(cache, Workers()).left == []
        assert files_of(cache) == before


def test_deep_finds_what_has_the_right_digests_and_the_wrong_sense(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    assert verify(cache, "deep") == []
    resealed(cache, "students/S", lambda data: data["constants"].update(vocab_size=3))
    assert any("a token id is not below 3" in one.reason for one in verify_rows.verify_rows(cache, "students/S"))
    resealed(cache, "documents", lambda data: data["commits"][1]["counts"].update(words=1))
    assert any("counts 1 words" in one.reason for one in verify_rows.verify_rows(cache, "documents"))


def test_a_check_that_raises_is_a_finding_on_its_unit_and_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = verify_rows._check_document
    monkeypatch.setattr(verify_rows, "_check_document", lambda row: str(1 // (row["line"] - 5)) and plain(row))

    (found,) = verify(small_cache.made() / "cache", "deep")

    assert (found.table, found.unit) == ("documents", 1)
    assert found.reason.startswith("cannot be read: ZeroDivisionError")


def test_text_that_cannot_be_read_is_a_finding_that_names_the_unit(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    content = shards(cache / "documents")[0].read_bytes()
    resigned(cache, "documents", 0, content.replace(b"It prints", b"\xfft prints", 1))

    assert ("documents", 0) in {(one.table, one.unit) for one in verify(cache, "deep")}


PIECES = (
    b"", b"{", b"null", b"NaN", b"1e999", b'"\\ud800"', b"\xff", b"\0", b"[" * 5000, b"-1", b"9" * 5000, b'"../x"',
)  # fmt: skip


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
    for _ in range(2 * ROUNDS):
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


def test_gc_removes_what_nothing_names_and_no_more(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    loose = [cache / "documents/00001-000000000000.arrow", cache / ".tmp-1-ab", cache / "teachers/T/quarantine/x"]
    for path in loose:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"loose")
    assert collect(cache, older_than=24, dry_run=False) == []
    for path in loose:
        os.utime(path, (0, 0))
    assert {one.file for one in collect(cache, older_than=24, dry_run=True)} == set(loose)
    assert sum(one.size for one in collect(cache, older_than=24, dry_run=False)) == 15
    assert files_of(cache) == before
    assert not any(path.exists() for path in loose)
