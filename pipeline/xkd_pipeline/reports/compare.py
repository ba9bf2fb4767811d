"""How well two models go together on some text.

Of their tokenizers: vocabularies, special tokens, normalisers, aligned spans. Of the models: whether the teacher is
better at predicting the targets than the untrained student, so that it can help at all.
"""

import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from xkd_pipeline.reports.render import render
from xkd_pipeline.reports.sample import Sample, reasons
from xkd_pipeline.tables.shard import extended_counts, token_counts
from xkd_schemas.documents import Document, Spans
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.text.alignment import align
from xkd_schemas.text.encode import REASONS, Encoder
from xkd_schemas.text.normalizer import normaliser_steps
from xkd_schemas.text.tokenizers import NAMED_TOKENS
from xkd_schemas.tokens import CONTENT, OK, Int32s, Tokens
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.models.bits_per_byte import bits_per_byte
from xkd_trainer.models.compute_dtype import choose_dtype, dtype_named, this_device
from xkd_trainer.models.forward import check_ids, check_model
from xkd_trainer.models.loading import load_model

LONGEST: Final = 4  # span lengths from here on are one class of the histogram
MOST_LENGTHS: Final = 8  # classes of the histogram that are printed
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
    """The normaliser's types in order, e.g. "NFKC, Lowercase"; "none" where there is none or it cannot be read."""
    steps = normaliser_steps(tokenizer.backend_tokenizer.normalizer)
    replaced = (f" {json.dumps(s['pattern'])} by {json.dumps(s['content'])}" if "pattern" in s else "" for s in steps)
    return ", ".join(s["type"] + more for s, more in zip(steps, replaced, strict=True)) or "none"


def measure_fertility(rows: Sequence[Tokens], documents: Sequence[Document]) -> dict[str, float]:
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
        ":".join(f"{LONGEST}+" if size >= LONGEST else str(size) for size in (a, b))
        for ours, theirs in aligned
        for a, b in zip((ours[:, 1] - ours[:, 0]).tolist(), (theirs[:, 1] - theirs[:, 0]).tolist(), strict=True)
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def exact_share(aligned: tuple[Int32s, Int32s], student: Tokens) -> float:
    """Share of a document's student tokens, template left out, that stand beside one teacher token alone."""
    ours, theirs = (spans[:, 1] - spans[:, 0] for spans in aligned)
    own = int((student.spans[:, 0] >= 0).sum())
    return float(((ours == 1) & (theirs == 1)).sum()) / own if own else 1.0


def compare(teacher: Encoder, student: Encoder, sample: Sample, *, worst: int, width: int) -> dict[str, Any]:
    """Everything `xkd-cache pair` says; the `worst` least aligned documents are drawn, the least aligned first.

    The student is cut where the teacher's text is, as `align` does.
    """
    documents = sample.documents
    theirs = teacher.encode_batch(documents)
    ours = student.encode_batch(documents, _ends(theirs))
    ends = [np.array([s.end for s in d.segments], np.int32) for d in documents]
    aligned = list(zip(*align(ours, theirs, ends), strict=True))
    usable = [i for i, (s, t) in enumerate(zip(ours, theirs, strict=True)) if s.status == OK and t.status == OK]
    shares = {i: exact_share(aligned[i], ours[i]) for i in usable}
    lengths = span_lengths([aligned[i] for i in usable])
    spans, exact = sum(lengths.values()), lengths.get("1:1", 0)
    texts = [d.text for d in documents]
    sides = (("teacher", teacher, theirs), ("student", student, ours))
    return {
        "corpus": [source.describe() for source in sample.sources],
        "sample": {
            "rows": sample.rows, "of": sample.corpus_rows, "documents": len(documents),
            "rejected": len(sample.rejected), "reasons": reasons(sample.rejected),
        },
        "vocabulary": vocabularies(student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()),
        "special_tokens": special_differences(teacher.tokenizer, student.tokenizer),
        "normaliser": {side: normaliser_of(reader.tokenizer) for side, reader, _ in sides},
        "template": {side: reader.template for side, reader, _ in sides},
        "fertility": {side: measure_fertility(rows, documents) for side, _, rows in sides},
        "extended": {side: extended_counts(rows) for side, _, rows in sides},
        "unusable": {
            side: {
                status: {"documents": number, "means": REASONS[status]}
                for status, number in sorted(Counter(rows.statuses).items()) if status != OK
            }
            for side, _, rows in sides
        },
        "cut": {side: token_counts(texts, rows)["cut"] for side, _, rows in sides},
        "aligned_documents": len(usable),
        "spans": spans, "exact_pairs": exact, "exact_share": exact / max(1, spans), "span_lengths": lengths,
        "worst": [
            {
                "source": documents[i].source, "line": documents[i].line, "doc_id": documents[i].doc_id,
                "exact_share": shares[i],
                "drawing": render(documents[i], NO_SPANS, ours[i], theirs[i], aligned[i], width).split("\n"),
            }
            for i in sorted(usable, key=lambda i: (shares[i], i))[:worst]
        ],
    }  # fmt: skip


def _ends(rows: Sequence[Tokens]) -> list[int | None]:
    return [row.num_chars if row.status == OK else None for row in rows]


def pair_lines(found: dict[str, Any]) -> Iterator[str]:
    """Lines of `compare`'s result."""
    sample, vocabulary = found["sample"], found["vocabulary"]
    yield from found["corpus"]
    why = f" ({sample['reasons']})" if sample["reasons"] else ""
    yield f"sample: {sample['rows']} of {sample['of']} rows, {sample['rejected']} rejected{why}"
    share = vocabulary["shared"] / max(1, vocabulary["student"])
    yield (
        f"vocabulary: teacher {vocabulary['teacher']}, student {vocabulary['student']}; {vocabulary['shared']} tokens "
        f"are the same text ({100 * share:.1f} % of the student's), {vocabulary['same_strings']} the same string"
    )
    for side, other in found["fertility"].items():
        yield (
            f"{side}: template {found['template'][side]}, "
            f"{other['tokens']} tokens, {other['per_word']:.2f} tokens per word, {other['per_character']:.3f} per "
            f"character; normaliser: {found['normaliser'][side]}; {found['cut'][side]} documents cut to its length"
        )
    for token in found["special_tokens"]:
        yield f"{token['token']}: teacher {token['teacher']!r}, student {token['student']!r}"
    if not found["special_tokens"]:
        yield "special tokens: the same strings"
    for side, other in found["extended"].items():
        if other["extended"]:
            yield (
                f"{side}: extended intervals: {other['extended']} tokens of {other['extended_documents']} documents, "
                "over what its normaliser merges, swaps or deletes"
            )
    for side, faults in found["unusable"].items():
        for status, fault in faults.items():
            yield f"{side} cannot use {fault['documents']} documents ({status}): {fault['means']}"
    yield (
        f"aligned: {found['aligned_documents']} documents, {found['spans']} spans, {100 * found['exact_share']:.1f} % "
        "of them one token on each side"
    )
    yield from _draw_histogram(found["span_lengths"], found["spans"])
    for document in found["worst"]:
        yield ""
        share = f"{100 * document['exact_share']:.1f} %"
        yield f"least aligned: {share} of the student's tokens stand beside one teacher token alone"
        yield from document["drawing"]


def _draw_histogram(lengths: dict[str, int], spans: int) -> Iterator[str]:
    bars = list(lengths.items())[:MOST_LENGTHS]
    rest = spans - sum(count for _, count in bars)
    for name, count in [*bars, ("other", rest)] if rest else bars:
        yield f"  {name:<5} {100 * count / spans:6.1f} % {'#' * round(40 * count / spans)}".rstrip()
    if lengths:
        yield "  (student tokens : teacher tokens of a span)"


def compare_models(
    models: tuple[str, str], encoders: tuple[Encoder, Encoder], dtype: str, sample: Sample
) -> dict[str, Any]:
    """Bits per byte of teacher and student, in this order, over the same characters."""
    documents = sample.documents
    ours = encoders[1].encode_batch(documents, _ends(encoders[0].encode_batch(documents)))
    theirs = encoders[0].encode_batch(documents, _ends(ours))
    usable = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a.status == OK and b.status == OK]
    if not usable:
        raise BadData("no row of the sample can be used by both models", fix="check the form of the rows")
    device = this_device()
    choice = choose_dtype(dtype, device)
    measured = []
    for name, encoder, rows in zip(models, encoders, (theirs, ours), strict=True):
        model = load_model(name, dtype=dtype_named(choice.dtype)).to(device)
        check_ids(rows.ids, encoder.tokenizer, len(model.get_input_embeddings().weight))
        check_model(model)
        measured.append(bits_per_byte(model, [(documents[i], rows[i]) for i in usable]))
        del model
        gc.collect()  # before the next one comes
    teacher, student = (found["bits_per_byte"] for found in measured)
    return {
        "documents": len(usable), "bytes": measured[0]["bytes"], "teacher": teacher, "student": student,
        "teacher_is_better": teacher < student, "dtype": choice.dtype,
    }  # fmt: skip


def model_lines(found: dict[str, Any]) -> Iterator[str]:
    """Lines of `compare_models`' result."""
    yield (
        f"bits per byte of {found['documents']} documents' targets: teacher {found['teacher']:.3f}, untrained student "
        f"{found['student']:.3f} ({found['dtype']})"
    )
    if not found["teacher_is_better"]:
        yield (
            "warning: the teacher is not better than the untrained student on these rows, so no loss is likely to "
            "help. Next: use a teacher that was trained on such rows, or train the student alone with --loss ce"
        )
