"""How well two tokenizers go together: vocabularies, special tokens, normalisers, and the spans of some text."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from xkd_pipeline.reports.render import render
from xkd_pipeline.reports.sample import Sample, reasons
from xkd_pipeline.tables.token_columns import extended_counts
from xkd_schemas.documents import Document, Spans
from xkd_schemas.errors import UsageError
from xkd_schemas.text.alignment import align
from xkd_schemas.text.encode import REASONS, Encoder
from xkd_schemas.text.tokenizers import NAMED_TOKENS
from xkd_schemas.tokens import CONTENT, OK, Int32s, Tokens
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary

LONGEST: Final = 4
"""Span lengths from here on are one class of the histogram."""
NO_SPANS: Final = Spans(words=(), phrases=(), labels=())


def vocabularies(student: Mapping[str, int], teacher: Mapping[str, int]) -> dict[str, int]:
    """Sizes, and how many tokens are the same text: by bytes ("shared") and as strings ("same_strings").

    >>> vocabularies({"Ġthe": 0, "a": 1}, {"▁the": 5, "a": 3, "b": 4})
    {'teacher': 3, 'student': 2, 'shared': 2, 'same_strings': 1}
    """
    try:
        shared = len(shared_vocabulary(student, teacher, "mapped")[0])
    except UsageError:  # they share nothing
        shared = 0
    same = len(student.keys() & teacher.keys())
    return {"teacher": len(teacher), "student": len(student), "shared": shared, "same_strings": same}


def special_differences(teacher: Any, student: Any) -> list[dict[str, Any]]:
    """Named special tokens that are not the same string; None where a tokenizer has none."""
    pairs = ((name, getattr(teacher, name), getattr(student, name)) for name in NAMED_TOKENS)
    return [{"token": name, "teacher": t, "student": s} for name, t, s in pairs if t != s]


def normaliser_of(tokenizer: Any) -> str:
    """The normaliser's types in order, e.g. "NFKC, Lowercase"; "none", or "unknown" where it cannot be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "unknown"
    described = json.loads(backend.to_str()).get("normalizer")
    if described is None:
        return "none"
    return ", ".join(_types(described)) or "none"


def _types(described: Mapping[str, Any]) -> list[str]:
    if described["type"] == "Sequence":
        return [name for part in described["normalizers"] for name in _types(part)]
    if described["type"] == "Replace":
        return [f"Replace {json.dumps(described['pattern'])} by {json.dumps(described['content'])}"]
    return [str(described["type"])]


def fertility(rows: Sequence[Tokens], documents: Sequence[Document]) -> dict[str, float]:
    """Content tokens, and those for each word (cut at blanks) and character of what was read."""
    tokens = sum(int((row.kinds == CONTENT).sum()) for row in rows)
    texts = [d.text[: row.num_chars] for d, row in zip(documents, rows, strict=True) if row.status == OK]
    words, characters = sum(len(text.split()) for text in texts), sum(map(len, texts))
    return {"tokens": tokens, "per_word": tokens / max(1, words), "per_character": tokens / max(1, characters)}


def span_lengths(aligned: Sequence[tuple[Int32s, Int32s]]) -> dict[str, int]:
    """Spans by "student tokens:teacher tokens", commonest first; 4+ is that many and more.

    >>> span_lengths([(np.array([[0, 1], [1, 7]]), np.array([[0, 1], [1, 3]]))])
    {'1:1': 1, '4+:2': 1}
    """
    found = Counter(
        f"{_length(a)}:{_length(b)}"
        for ours, theirs in aligned
        for a, b in zip((ours[:, 1] - ours[:, 0]).tolist(), (theirs[:, 1] - theirs[:, 0]).tolist(), strict=True)
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _length(number: int) -> str:
    return f"{LONGEST}+" if number >= LONGEST else str(number)


def exact_share(aligned: tuple[Int32s, Int32s], student: Tokens) -> float:
    """Share of a document's student tokens, template left out, that stand beside one teacher token alone."""
    ours, theirs = (spans[:, 1] - spans[:, 0] for spans in aligned)
    own = int((student.spans[:, 0] >= 0).sum())
    return float(((ours == 1) & (theirs == 1)).sum()) / own if own else 1.0


def compare(teacher: Encoder, student: Encoder, sample: Sample, *, worst: int, width: int) -> dict[str, Any]:
    """Everything `xkd-cache pair` says.

    Args:
        teacher: How the teacher reads a document.
        student: How the student does; it is cut where the teacher's text is, as `align` does.
        sample: Documents to look at.
        worst: Documents to draw, least aligned first.
        width: Columns of a drawing.
    """
    documents = sample.documents
    theirs = teacher.encode_batch(documents)
    ours = student.encode_batch(documents, [t.num_chars if t.status == OK else None for t in theirs])
    ends = [np.array([s.end for s in d.segments], np.int32) for d in documents]
    aligned = list(zip(*align(ours, theirs, ends), strict=True))
    usable = [i for i, (s, t) in enumerate(zip(ours, theirs, strict=True)) if s.status == OK and t.status == OK]
    shares = {i: exact_share(aligned[i], ours[i]) for i in usable}
    lengths = span_lengths([aligned[i] for i in usable])
    spans = sum(lengths.values())
    low = sorted(usable, key=lambda i: (shares[i], i))[:worst]
    return {
        "corpus": [source.describe() for source in sample.sources],
        "sample": {
            "rows": sample.rows, "of": sample.corpus_rows, "documents": len(documents),
            "rejected": len(sample.rejected), "reasons": reasons(sample.rejected),
        },
        "vocabulary": vocabularies(student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()),
        "special_tokens": special_differences(teacher.tokenizer, student.tokenizer),
        "normaliser": {"teacher": normaliser_of(teacher.tokenizer), "student": normaliser_of(student.tokenizer)},
        "template": {"teacher": teacher.template, "student": student.template},
        "fertility": {"teacher": fertility(theirs, documents), "student": fertility(ours, documents)},
        "extended": {"teacher": extended_counts(theirs), "student": extended_counts(ours)},
        "unusable": {"teacher": _reasons(theirs), "student": _reasons(ours)},
        "cut": {"teacher": _cut(theirs, documents), "student": _cut(ours, documents)},
        "aligned_documents": len(usable),
        "spans": spans,
        "exact_pairs": lengths.get("1:1", 0),
        "exact_share": lengths.get("1:1", 0) / max(1, spans),
        "span_lengths": lengths,
        "worst": [
            {
                "source": documents[i].source, "line": documents[i].line, "doc_id": documents[i].doc_id,
                "exact_share": shares[i],
                "drawing": render(documents[i], NO_SPANS, ours[i], theirs[i], aligned[i], width).split("\n"),
            }
            for i in low
        ],
    }  # fmt: skip


def _reasons(rows: Sequence[Tokens]) -> dict[str, dict[str, Any]]:
    found = Counter(row.status for row in rows if row.status != OK)
    return {status: {"documents": number, "means": REASONS[status]} for status, number in sorted(found.items())}


def _cut(rows: Sequence[Tokens], documents: Sequence[Document]) -> int:
    return sum(row.status == OK and row.num_chars < len(d.text) for row, d in zip(rows, documents, strict=True))
