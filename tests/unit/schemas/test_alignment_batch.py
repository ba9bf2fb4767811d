"""Many documents at once give what each gives alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import four_tokenizers
from references.alignment import align_one, ranges_of
from xkd_schemas.documents import Document, document_of
from xkd_schemas.text.alignment import align, token_ranges
from xkd_schemas.text.encode import Encoder

TEXTS = st.text(st.sampled_from("ab cé \n👩\u200d💻é漢字ا،\t  xyz"), min_size=1, max_size=40)
DOCUMENTS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def encoder(kind: str, max_tokens: int) -> Encoder:
    return Encoder(tokenizer=four_tokenizers.tokenizer_of(kind), template="none", max_tokens=max_tokens)


def documents_of(pairs: list[tuple[str, str]]) -> list[Document]:
    return [
        document_of([("prompt", p, False), ("response", r, True)], source="s", line=n)
        for n, (p, r) in enumerate(pairs, 1)
    ]


@settings(max_examples=60, deadline=None)
@given(pairs=DOCUMENTS, kinds=st.permutations(["byte_level", "sentencepiece", "wordpiece"]), limit=st.integers(6, 60))
def test_documents_of_a_block_align_as_they_do_alone(
    pairs: list[tuple[str, str]], kinds: list[str], limit: int
) -> None:
    documents = documents_of(pairs)
    teachers = encoder(kinds[0], limit).encode_batch(documents)
    students = encoder(kinds[1], 50).encode_batch(documents, [t.num_chars for t in teachers])
    ends = [np.array([s.end for s in d.segments], np.int32) for d in documents]
    words = [np.array([[i, i + 2] for i in range(0, len(d.text) - 1, 2)], np.int32).reshape(-1, 2) for d in documents]

    aligned, ranges = align(students, teachers, ends), token_ranges(students, words)

    for n in range(len(documents)):
        if students[n].status == teachers[n].status == "ok":
            alone = align_one(students[n], teachers[n], ends[n])
            assert [a[n].tolist() for a in aligned] == [a.tolist() for a in alone]
        else:
            assert [len(a[n]) for a in aligned] == [0, 0]
        assert ranges[n].tolist() == ranges_of(students[n], words[n]).tolist()


def test_no_documents_give_no_rows() -> None:
    assert [len(side) for side in align([], [], [])] == [0, 0]
    assert len(token_ranges([], [])) == 0
