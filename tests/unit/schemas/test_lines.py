import gzip
import hashlib
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_schemas.corpus import line_reader as lines
from xkd_schemas.corpus.line_reader import LongLine, expand, read_chunks, split_lines
from xkd_schemas.errors import BadData, InputMissing, Refused

CONTENTS = st.lists(st.sampled_from([b"\n", b"\r", b"a", b"\x85", b"\xe2\x80\xa8", b"\x0b", b"xyz"]), max_size=40)


def cut(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def packed(content: bytes, suffix: str, members: int = 1) -> bytes:
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    size = -(-len(content) // members) or 1
    return b"".join(pack(part) for part in cut(content, size)) or pack(b"")


def expanded(path: Path) -> bytes:
    return b"".join(expand(path, read_chunks(path)))


@given(pieces=CONTENTS, size=st.integers(1, 9))
def test_lines_are_cut_at_newline_bytes_only_however_the_chunks_fall(pieces: list[bytes], size: int) -> None:
    content = b"".join(pieces)

    found = list(split_lines(cut(content, size)))

    wanted = content.split(b"\n")
    assert [line for _, line in found] == (wanted if wanted[-1] else wanted[:-1])
    assert all(content[at:].startswith(line) for at, line in found)
    assert all(at == 0 or content[at - 1 : at] == b"\n" for at, _ in found)


@given(length=st.integers(290, 600), size=st.integers(1, 700))
def test_a_line_above_the_limit_is_kept_as_length_digest_and_head(length: int, size: int) -> None:
    content = b"ab\n" + b"x" * length + b"\nz"

    found = [line for _, line in split_lines(cut(content, size), limit=300)]

    long = b"x" * length
    kept = LongLine(num_bytes=length, sha256=hashlib.sha256(long).hexdigest(), head=long[: lines.HEAD_BYTES])
    assert found == [b"ab", kept if length > 300 else long, b"z"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("members", [1, 3])
def test_compressed_files_expand_to_what_was_packed(tmp_path: Path, suffix: str, members: int) -> None:
    content = bytes(range(256)) * 9000
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(packed(content, suffix, members))

    assert expanded(path) == content


@settings(max_examples=25)
@given(data=st.data(), suffix=st.sampled_from([".gz", ".zst"]))
def test_a_compressed_file_that_was_cut_off_is_bad_data(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    whole = packed(bytes(zlib.crc32(bytes([i % 251, i // 251])) % 256 for i in range(5000)), suffix)
    path = tmp_path_factory.mktemp("cut") / f"rows.jsonl{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])

    with pytest.raises(BadData, match=r"rows\.jsonl"):
        expanded(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_only_claims_to_be_compressed_is_bad_data(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(b'{"text": "plain"}\n' * 10)

    with pytest.raises(BadData, match="not a sound"):
        expanded(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_empty_file_has_no_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(b"")

    assert list(split_lines(expand(path, read_chunks(path)))) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(packed(bytes(300 << 20), suffix))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(Refused, match="expand it yourself"):
        sum(map(len, expand(path, read_chunks(path))))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # KiB


def test_a_small_file_of_equal_lines_is_no_bomb(tmp_path: Path) -> None:
    content = b'{"text": "again"}\n' * 100_000
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(packed(content, ".zst"))

    assert expanded(path) == content


def test_a_gigabyte_without_newline_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)  # a sparse file
    code = (
        "import re, sys; from pathlib import Path; from xkd_schemas.corpus.line_reader import *\n"
        "(at, line), = split_lines(read_chunks(Path(sys.argv[1])))\n"
        "print(line.num_bytes, *re.findall(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text()))"
    )

    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)

    num_bytes, kib = map(int, done.stdout.split())
    assert num_bytes == 1 << 30
    assert kib < 200 << 10


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"gone\.jsonl: No such file"):
        list(read_chunks(tmp_path / "gone.jsonl"))
