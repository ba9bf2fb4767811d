"""A shard read at once is its rows, and tokens made at once are the ones made document by document."""

from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from four_tokenizers import KINDS, encoder_of, nasty_documents
from slow_alignment import align_one, ranges_of
from small_cache import made
from xkd_pipeline.alignment import align_rows
from xkd_pipeline.tables.shard import DocumentRows, document_at, documents_of
from xkd_schemas.cache.table import Table
from xkd_schemas.documents import Document, DocumentBatch
from xkd_schemas.ragged import Ragged
from xkd_schemas.text import encode
from xkd_schemas.tokens import OK


def test_a_shard_of_documents_is_its_rows() -> None:
    table = Table(made() / "cache", "documents")
    for unit, commit in enumerate(table.manifest.commits):
        shard = table.shard(unit)
        whole, rows = documents_of(shard), [shard.row(i) for i in range(commit.rows)]

        assert [whole.block.document(n) for n in range(len(rows))] == [document_at(row) for row in rows]
        assert list(whole.doc_ids) == [row["doc_id"] for row in rows]
        for name, found in (("words", whole.words), ("phrases", whole.phrases)):
            assert [span.tolist() for span in found] == [row[name].tolist() for row in rows]


@settings(deadline=None, max_examples=70)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), longest=st.sampled_from([20, 10_000]),
    several=st.lists(nasty_documents, min_size=1, max_size=5), most_chars=st.sampled_from([30, 2**20]),
)  # fmt: skip
def test_hostile_rows_aligned_at_once_are_those_aligned_alone(
    kinds: tuple[str, str], several: list[Document], longest: int, most_chars: int
) -> None:
    student_kind, teacher_kind = kinds
    words = [[(at, min(at + 3, len(d.text))) for at in range(0, len(d.text), 2)] for d in several]
    found = Ragged.of(words, np.int32, 2)
    rows = DocumentRows(doc_ids=["d"] * len(several), block=DocumentBatch.of(several), words=found, phrases=found)
    with mock.patch.object(encode, "MOST_CHARS", most_chars):  # that are encoded at once
        teacher = encoder_of(teacher_kind, 60).encode_batch(several)
        tokens, columns, _ = align_rows(encoder_of(student_kind, longest), rows, teacher)

    for n, document in enumerate(several):
        limit = teacher[n].num_chars if teacher[n].status == OK else None
        alone = encoder_of(student_kind, longest).encode(document, limit)
        if teacher[n].status != OK:
            assert columns["status"][n] == f"teacher:{teacher[n].status}"
            assert len(tokens[n].ids) == len(columns["student_spans"][n]) == 0
            continue
        same = ("status", "num_chars", "extended")
        assert [getattr(tokens[n], name) for name in same] == [getattr(alone, name) for name in same]
        np.testing.assert_array_equal(columns["token_ids"][n], alone.ids)
        np.testing.assert_array_equal(columns["token_spans"][n], alone.spans)
        np.testing.assert_array_equal(columns["word_tokens"][n], ranges_of(alone, found[n]))
        if alone.status == OK:
            ours, theirs = align_one(alone, teacher[n], np.array([s.end for s in document.segments], np.int32))
            np.testing.assert_array_equal(columns["student_spans"][n], ours)
            np.testing.assert_array_equal(columns["teacher_spans"][n], theirs)
