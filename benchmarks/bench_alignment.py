"""Offsets, intervals, templates and alignment for a student, against the tokenizer alone.

The tokenizer alone is `encode_batch` of the tokenizers library on the same segments: nothing is read out of it. The
bar of 1.0 is for offsets and alignment against the tokenization of both models; the whole align stage against the
student's tokenizer is held to it too. Alignment alone is the merge of the two models' intervals, in tokens a second.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from benchmarks.measure import Options, cost, interleaved, ratio
from benchmarks.measure import Row as Figures
from benchmarks.pair import pair_of
from xkd_pipeline.alignment import align_rows
from xkd_pipeline.tables.shard import DocumentRows, encoder_for
from xkd_schemas.cache.table import Row, Table
from xkd_schemas.config import StudentSection
from xkd_schemas.ragged import Ragged
from xkd_schemas.text.alignment import align, content_of, grouped_spans
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import OK, Int32s, Int64s, TokenBatch


def run(options: Options) -> list[Figures]:
    """The cache's documents, and documents of about 4,000 characters glued from them."""
    pair = pair_of(options)
    documents = Table(pair.cache, "documents")
    number = min(len(documents), options.size(512, 16))
    rows = [documents[i] for i in range(number)]
    settings = StudentSection(template=pair.template, max_tokens=100_000)
    reader, encoder = encoder_for(pair.teacher, settings), encoder_for(pair.tokenizer, settings)
    return [
        figures
        for some in (rows, glued(rows, 4_000))
        for figures in _measured(
            f"{len(some)} documents of {_mean(some)} characters", encoder, reader, some, options.repeats
        )
    ]


def glued(rows: Sequence[Row], characters: int) -> list[Row]:
    """Documents of one prompt and one response, each made of those of some rows; the last one may be short."""
    groups: list[list[Row]] = [[]]
    for row in rows:
        if sum(len(r["text"]) for r in groups[-1]) >= characters:
            groups.append([])
        groups[-1].append(row)
    return [cast(Row, _joined(group)) for group in groups if group]


def _joined(rows: Sequence[Row]) -> Mapping[str, Any]:
    texts: dict[bool, str] = {False: "", True: ""}
    for row in rows:
        for (start, end), target in zip(row["segments"], row["targets"], strict=True):
            texts[bool(target)] += row["text"][start:end] + " "
    text, border = texts[False] + texts[True], len(texts[False])
    inside, at = {"words": [], "phrases": []}, {False: 0, True: border}  # type: dict[str, list[Any]], dict[bool, int]
    for row in rows:
        for (start, end), target in zip(row["segments"], row["targets"], strict=True):
            move = at[bool(target)] - start
            for name, found in inside.items():
                found += [(a + move, b + move) for a, b in row[name] if start <= a and b <= end]
            at[bool(target)] += end - start + 1
    spans = {name: np.array(sorted(found), np.int32).reshape(-1, 2) for name, found in inside.items()}
    segments = np.array([[0, border], [border, len(text)]], np.int32)
    roles = {"roles": ["prompt", "response"], "targets": np.array([False, True])}
    return {"doc_id": "", "source": "", "line": 1, "text": text, "segments": segments, **roles, **spans}


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Every segment of every row, as the encoder hands them to the tokenizer."""
    return [row["text"][start:end] for row in rows for start, end in row["segments"]]


def _measured(what: str, encoder: Encoder, reader: Encoder, some: Sequence[Row], repeats: int) -> list[Figures]:
    """What alignment costs against the tokenizers, and how fast it is alone."""
    texts, rows = texts_of(some), DocumentRows.of(some)
    teacher = reader.encode_batch(rows.block)
    aligned = align_rows(encoder, rows, teacher)[0]
    assert set(aligned.statuses) == {OK}, "a document that is not encoded costs nothing"
    ends = Ragged(rows.block.segments.values[:, 1], rows.block.segments.first)
    tokenizers = [e.tokenizer.backend_tokenizer for e in (encoder, reader)]
    merged = [*intervals_of(aligned, ends), *intervals_of(teacher, ends)]
    seconds = interleaved(
        {
            "stage": lambda: align_rows(encoder, rows, teacher),
            "student": lambda: tokenizers[0].encode_batch(texts, add_special_tokens=False),
            "teacher": lambda: tokenizers[1].encode_batch(texts, add_special_tokens=False),
            "both": lambda: (reader.encode_batch(rows.block), encoder.encode_batch(rows.block)),
            "alignment": lambda: align(aligned, teacher, ends),
            "merge": lambda: grouped_spans(*merged),
        },
        repeats,
    )
    bare, stage = seconds["student"] + seconds["teacher"], seconds["stage"] - seconds["student"]
    offsets = seconds["both"] + seconds["alignment"] - bare
    millions = (len(merged[0]) + len(merged[2])) / 1e6  # a second of this core: the one bar that is no ratio
    return [
        cost(f"{what}: offsets of both models and alignment / both bare tokenizers", offsets, bare, bar=1.0),
        cost(f"{what}: all that the align stage adds / the bare tokenizer", stage, seconds["student"], bar=1.0),
        cost(f"{what}: alignment / both tokenizations with offsets", seconds["alignment"], seconds["both"]),
        ratio(
            f"{what}: tokens aligned a second", millions, seconds["merge"], "million tokens, s", bar=100, at_least=True
        ),
    ]


def intervals_of(tokens: TokenBatch, ends: Ragged) -> tuple[Int32s, Int64s]:
    """Intervals [S, 2] of the content tokens of all documents, and where each document's segments begin [G + 1]."""
    at_S, first = content_of(tokens, ends)
    return tokens.spans[at_S], first


def _mean(rows: Sequence[Row]) -> int:
    return round(sum(len(row["text"]) for row in rows) / max(1, len(rows)))
