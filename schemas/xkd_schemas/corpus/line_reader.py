r"""Bytes of a corpus file to lines: `\n` is the only separator, nothing is decoded, memory is bounded.

Text mode and `splitlines` also cut at lone CR, NEL, VT and U+2028, which are ordinary characters
inside JSON strings. Compressed files are expanded as a stream; a file that grows without measure
is refused, and one that was cut off is bad data, never a shorter corpus.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xkd_schemas.errors import BadData, InputMissing, Refused

MAX_LINE_BYTES: Final = 64 << 20
"""A longer line is kept as its length, digest and head only."""
HEAD_BYTES: Final = 256
"""How much of such a line is kept."""
CHUNK_BYTES: Final = 1 << 20
"""How much is read from disk at once."""
MAX_RATIO: Final = 200
"""Expanded bytes a compressed byte may stand for, once FREE_BYTES have been expanded."""
FREE_BYTES: Final = 64 << 20
"""Expanded bytes before the ratio is looked at: a small file of equal lines is no bomb."""
MAX_EXPANDED_BYTES: Final = 64 << 30
"""Expanded size of one compressed file."""
MAX_ZSTD_WINDOW: Final = 128 << 20
"""Memory a zstd frame may ask for; `zstd --long=27` needs this much."""
ZSTD_PIECE_BYTES: Final = 4096
"""Compressed bytes handed to zstd at once: 4 bytes can stand for 128 KiB, so this bounds a piece to 128 MiB."""
BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class LongLine:
    """A line above the limit; its bytes were read and dropped."""

    num_bytes: int
    sha256: str
    head: bytes
    """The first HEAD_BYTES bytes."""


Line = bytes | LongLine


def read_chunks(path: Path, *, first_byte: int = 0, digest: "hashlib._Hash | None" = None) -> Iterator[bytes]:
    """Raw bytes of a file from `first_byte` on, taken into `digest` as they pass.

    Raises:
        InputMissing: the file is not there or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(first_byte)
            while chunk := stream.read(CHUNK_BYTES):
                if digest is not None:
                    digest.update(chunk)
                yield chunk
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror or error}", fix="check the path and its permissions") from error


def _gunzip(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Expand gzip members one after the other; a member without its end is BadData."""
    member, started = zlib.decompressobj(31), False
    for chunk in chunks:
        while chunk:
            if member.eof:
                chunk = chunk.lstrip(b"\0")  # gzip allows zero bytes between and after members
                if not chunk:
                    break
                member = zlib.decompressobj(31)
            started = True
            yield member.decompress(chunk, CHUNK_BYTES)
            chunk = member.unused_data if member.eof else member.unconsumed_tail
    while started and not member.eof and (rest := member.decompress(b"", CHUNK_BYTES)):
        yield rest
    if started and not member.eof:
        raise BadData(f"{path}: the gzip file ends in the middle", fix="copy or download it again")


def _unzstd(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Expand zstd frames one after the other; a frame without its end is BadData."""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame, started = context.decompressobj(), False
    try:
        for chunk in chunks:
            for at in range(0, len(chunk), ZSTD_PIECE_BYTES):
                piece = chunk[at : at + ZSTD_PIECE_BYTES]
                while piece:
                    frame = context.decompressobj() if frame.eof else frame
                    started = True
                    yield frame.decompress(piece)
                    piece = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise BadData(f"{path}: not a sound zstd file: {error}", fix="copy or download it again") from error
    if started and not frame.eof:
        raise BadData(f"{path}: the zstd file ends in the middle", fix="copy or download it again")


EXPANDERS: Mapping[str, Callable[[Path, Iterator[bytes]], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}


def expand(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a file whose raw bytes are `chunks`: expanded for .gz and .zst, else as it is.

    Raises:
        BadData: the compressed file is broken or was cut off.
        Refused: it expands beyond MAX_RATIO or MAX_EXPANDED_BYTES.
    """
    expander = EXPANDERS.get(path.suffix)
    if expander is None:
        yield from chunks
        return
    num_read = num_written = 0

    def counting() -> Iterator[bytes]:
        nonlocal num_read
        for chunk in chunks:
            num_read += len(chunk)
            yield chunk

    try:
        for content in expander(path, counting()):
            num_written += len(content)
            if num_written > min(MAX_EXPANDED_BYTES, max(FREE_BYTES, MAX_RATIO * num_read)):
                raise Refused(
                    f"{path}: {num_read:,} compressed bytes have grown to more than {num_written:,}",
                    fix="if you trust the file, expand it yourself and name the plain .jsonl",
                )
            yield content
    except zlib.error as error:
        raise BadData(f"{path}: not a sound gzip file: {error}", fix="copy or download it again") from error


class _OpenLine:
    """The line that is being read: its pieces, or only its head and digest once it is too long."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self.pieces: list[bytes] = []
        self.digest: hashlib._Hash | None = None

    def add(self, piece: bytes) -> None:
        self.num_bytes += len(piece)
        if self.digest is not None:
            self.digest.update(piece)
            return
        self.pieces.append(piece)
        if self.num_bytes > self.limit:
            self.digest = hashlib.sha256()
            for part in self.pieces:
                self.digest.update(part)
            self.pieces = [b"".join(part[:HEAD_BYTES] for part in self.pieces)[:HEAD_BYTES]]

    def line(self) -> Line:
        content = b"".join(self.pieces)
        if self.digest is None:
            return content
        return LongLine(num_bytes=self.num_bytes, sha256=self.digest.hexdigest(), head=content)


def split_lines(chunks: Iterator[bytes], *, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, Line]]:
    r"""(byte offset, line) for every line, without its `\n`; bytes after the last `\n` are a line too.

    A line of more than `limit` bytes (at least HEAD_BYTES) comes as a LongLine.

    >>> list(split_lines(iter([b"a\r", b"\nbc", b"d"])))
    [(0, b'a\r'), (3, b'bcd')]
    """
    current, at = _OpenLine(limit), 0
    for chunk in chunks:
        *ends, tail = chunk.split(b"\n")
        for piece in ends:
            current.add(piece)
            yield at, current.line()
            at += current.num_bytes + 1
            current = _OpenLine(limit)
        if tail:
            current.add(tail)
    if current.num_bytes:
        yield at, current.line()
