import gzip
import hashlib
import re
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faulty_disk import exit_code_of
from xkd_schemas.corpus import files
from xkd_schemas.corpus.files import LongLine, count_file, file_rows
from xkd_schemas.errors import BadData, InputMissing, Refused

CONTENTS = st.lists(st.sampled_from([b"\n", b"\r", b"a", b"\x85", b"\xe2\x80\xa8", b"\x0b", b"xyz"]), max_size=40)
SUFFIXES = ("", ".gz", ".zst")
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def pack(content: bytes, suffix: str, members: int = 1) -> bytes:
    if not suffix:
        return content
    size = -(-len(content) // members) or 1
    parts = [content[at : at + size] for at in range(0, len(content), size)] or [b""]
    return b"".join(gzip.compress(p) if suffix == ".gz" else pa.compress(p, "zstd", asbytes=True) for p in parts)


def lines_of(path: Path, content: bytes) -> list[object]:
    path.write_bytes(content)
    return list(file_rows(count_file(path)[0], 0, None))


@in_one_folder
@given(pieces=CONTENTS, suffix=st.sampled_from(SUFFIXES), bom=st.booleans())
def test_lines_are_cut_at_newline_bytes_only(tmp_path: Path, pieces: list[bytes], suffix: str, bom: bool) -> None:
    content = b"".join(pieces)
    wanted = content.split(b"\n")
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(files.BOM * bom + content, suffix) if bom or content else b"")

    part, _ = count_file(path)
    from_each = [list(file_rows(part, first, None)) for first in range(part.num_rows)]

    lines = [line.removesuffix(b"\r") for line in (wanted if wanted[-1] else wanted[:-1])]
    assert from_each == [lines[first:] for first in range(part.num_rows)]
    assert part.num_rows == max((n for n, line in enumerate(lines, 1) if line.strip()), default=0)


@pytest.mark.parametrize("length", [299, 300, 301, 302, 599, 600, 1500])
@pytest.mark.parametrize("end", [b"\nz", b"\n", b""])
def test_a_long_line_is_kept_as_length_digest_and_head(tmp_path: Path, monkeypatch, length: int, end: bytes) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 300)
    long = b"x" * length

    found = lines_of(tmp_path / "rows.jsonl", b"ab\n" + long + end)

    kept = LongLine(num_bytes=length, sha256=hashlib.sha256(long).hexdigest(), head=long[: files.HEAD_BYTES])
    assert found == [b"ab", kept if length > 300 else long, *end.split()]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_all_members_of_a_compressed_file_are_read(tmp_path: Path, suffix: str) -> None:
    content = bytes(range(11, 256)) * 9000

    assert lines_of(tmp_path / f"rows.jsonl{suffix}", pack(content, suffix, members=3)) == [content]


@settings(in_one_folder, max_examples=25)
@given(data=st.data(), suffix=st.sampled_from([".gz", ".zst"]))
def test_a_compressed_file_that_was_cut_off_is_bad_data(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    whole = pack(bytes(zlib.crc32(bytes([i % 251, i // 251])) % 256 for i in range(5000)), suffix)

    with pytest.raises(BadData, match=r"rows\.jsonl"):
        lines_of(tmp_path / f"rows.jsonl{suffix}", whole[: data.draw(st.integers(1, len(whole) - 1))])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch, suffix: str) -> None:
    monkeypatch.setattr(files, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 18)

    with pytest.raises(Refused, match="expand it yourself") as caught:
        lines_of(tmp_path / f"rows.jsonl{suffix}", pack(bytes(16 << 20), suffix))

    read = re.findall(r"grown to more than ([\d,]+)", str(caught.value))[0]
    assert int(read.replace(",", "")) < 4 << 20


def test_a_small_file_of_equal_lines_is_no_bomb(tmp_path: Path) -> None:
    content = b'{"text": "again"}\n' * 20_000

    assert len(lines_of(tmp_path / "rows.jsonl.zst", pack(content, ".zst"))) == 20_000


def peak() -> int:
    """KiB that this process has had in memory."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def test_a_huge_file_without_newline_is_read_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as stream:
        stream.truncate(300 << 20)  # a sparse file

    def count() -> None:
        before = peak()
        assert count_file(tmp_path / "rows.jsonl")[0].num_rows == 1
        assert peak() - before < 220 << 10

    assert exit_code_of(count) == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"gone\.jsonl: No such file"):
        count_file(tmp_path / "gone.jsonl")
