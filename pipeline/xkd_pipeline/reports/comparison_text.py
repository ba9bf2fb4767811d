"""What `pair` found, in lines for people."""

from collections.abc import Iterator
from typing import Any, Final

MOST_LENGTHS: Final = 8
"""Classes of the histogram that are printed."""


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
            f"{other['tokens']} tokens, {other['per_word']:.2f} a word, {other['per_character']:.3f} a "
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
        "of them one token to one"
    )
    yield from _histogram(found["span_lengths"], found["spans"])
    for document in found["worst"]:
        yield ""
        yield f"least aligned: {100 * document['exact_share']:.1f} % of the student's tokens stand beside one alone"
        yield from document["drawing"]


def _histogram(lengths: dict[str, int], spans: int) -> Iterator[str]:
    """Bars of at most 40 signs."""
    for number, (name, count) in enumerate(lengths.items()):
        if number == MOST_LENGTHS:
            rest = sum(list(lengths.values())[MOST_LENGTHS:])
            yield f"  other {100 * rest / spans:6.1f} %"
            return
        bar = "#" * round(40 * count / spans)
        yield f"  {name:<5} {100 * count / spans:6.1f} % {bar}".rstrip()
    if lengths:
        yield "  (student tokens : teacher tokens of a span)"
