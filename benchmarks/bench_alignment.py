"""Offsets, intervals, templates and alignment for a student, against the tokenizer alone.

The tokenizer alone is `encode_batch` of the tokenizers library on the same segments: nothing is read out of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from benchmarks.measure import Options, interleaved
from benchmarks.pair import pair_of
from benchmarks.rows import Row as Figures
from benchmarks.rows import cost
from xkd_pipeline.align import StudentSettings, align_rows, tokens_at
from xkd_pipeline.capture import TeacherSettings
from xkd_pipeline.documents import document_at
from xkd_pipeline.teacher import encoder_of
from xkd_schemas.alignment_batch import align_all, token_ranges_all
from xkd_schemas.encode import Encoder
from xkd_schemas.table import Row, Table, names_in
from xkd_schemas.tokens import OK, Tokens


def run(options: Options) -> list[Figures]:
    """The cache's documents, and documents of about 4,000 characters glued from them."""
    pair = pair_of(options)
    documents = Table(pair.cache, "documents")
    teachers = Table(pair.cache, f"teachers/{names_in(pair.cache, 'teachers')[0]}")
    number = min(len(documents), options.size(512, 16))
    rows, tokens = [documents[i] for i in range(number)], [tokens_at(teachers[i]) for i in range(number)]
    long = glued(rows, 4_000)
    reader = encoder_of(TeacherSettings(model=pair.teacher, template=pair.template, max_tokens=100_000))
    read = reader.encode_batch([document_at(row) for row in long])
    settings = StudentSettings(tokenizer=pair.tokenizer, template=pair.template, max_tokens=100_000)
    return [
        figures
        for r, t in ((rows, tokens), (long, read))
        for figures in _measured(
            f"{len(r)} documents of {_mean(r)} characters", (settings.encoder(), reader), r, t, options.repeats
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
    roles = {"roles": ["prompt", "response"], "targets": [False, True]}
    return {"doc_id": "", "source": "", "line": 1, "text": text, "segments": segments, **roles, **spans}


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Every segment of every row, as the encoder hands them to the tokenizer."""
    return [row["text"][start:end] for row in rows for start, end in row["segments"]]


def _measured(
    what: str, encoders: tuple[Encoder, Encoder], rows: Sequence[Row], teacher: Sequence[Tokens], repeats: int
) -> list[Figures]:
    """What the comparison of two tokenizations costs against making both, and all that `align` adds to a tokenizer."""
    encoder, reader = encoders
    texts, documents = texts_of(rows), [document_at(row) for row in rows]
    ends, words, phrases = ([row[name] for row in rows] for name in ("segments", "words", "phrases"))
    tokenizer = encoder.tokenizer.backend_tokenizer
    aligned = align_rows(encoder, rows, teacher)[0]
    assert all(t.status == OK for t in aligned), "a document that is not encoded costs nothing"
    seconds = interleaved(
        {
            "ours": lambda: align_rows(encoder, rows, teacher),
            "tokenizer": lambda: tokenizer.encode_batch(texts, add_special_tokens=False),
            "both": lambda: (reader.encode_batch(documents), encoder.encode_batch(documents)),
            "alignment": lambda: align_all(aligned, teacher, [s[:, 1] for s in ends]),
            "ranges": lambda: (token_ranges_all(aligned, words), token_ranges_all(aligned, phrases)),
        },
        repeats,
    )
    extra = seconds["ours"] - seconds["tokenizer"]
    return [
        cost(f"{what}: alignment / both tokenizations with offsets", seconds["alignment"], seconds["both"], bar=0.2),
        cost(f"{what}: word and phrase ranges / the same", seconds["ranges"], seconds["both"]),
        cost(f"{what}: all that the align stage adds / the bare tokenizer", extra, seconds["tokenizer"], bar=0.2),
    ]


def _mean(rows: Sequence[Row]) -> int:
    return round(sum(len(row["text"]) for row in rows) / max(1, len(rows)))
