"""Stage 3: a student's tokens beside the teacher's. CPU only, minutes, once for each student tokenizer."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xkd_pipeline.tables.shard import (  # fmt: skip
    DocumentRows,
    documents_of,
    encoder_for,
    token_columns,
    token_counts,
    tokens_of,
    write_shard,
)
from xkd_pipeline.tables.writer import Built, Store, build
from xkd_pipeline.workers.contract import Make, TableStage, Workers, local_paths
from xkd_schemas.cache.manifest import Commit, MadeDifferently
from xkd_schemas.cache.table import Table
from xkd_schemas.config import StudentSection
from xkd_schemas.durable_files import save_folder
from xkd_schemas.ragged import Ragged
from xkd_schemas.text.alignment import align, token_ranges
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import OK, STUDENTS, STUDENTS_VERSION, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignStage(TableStage):
    """Tokenizes and aligns the documents of one shard."""

    teacher: str
    settings: StudentSection

    def load(self) -> Make:
        """Load the tokenizer once."""
        encoder = encoder_for(self.settings.tokenizer, self.settings)
        documents, teachers = Table(self.root, "documents"), Table(self.root, self.teacher)

        def make(unit: int, care: MadeDifferently) -> Commit:
            rows, teacher = documents_of(documents.shard(unit), care.lost), tokens_of(teachers.shard(unit))
            tokens, columns, counts = _in_batches(encoder, rows, teacher, care.batch or len(teacher))
            counts |= token_counts(rows.block.texts, tokens)
            return write_shard(self.folder, unit, STUDENTS, columns, counts=counts)

        return make

    def paths(self) -> tuple[Path, ...]:
        """The table's folder, the two tables it is made from, and the tokenizer."""
        return TableStage.paths(self) + local_paths(self.root / self.teacher, self.settings.tokenizer)


Aligned = tuple[TokenBatch, dict[str, Any], dict[str, int]]


def _in_batches(encoder: Encoder, rows: DocumentRows, teacher: TokenBatch, size: int) -> Aligned:
    if len(teacher) <= size:
        return align_rows(encoder, rows, teacher)
    cuts = itertools.pairwise([*range(0, len(teacher), size), len(teacher)])
    parts = [align_rows(encoder, rows.part(*cut), TokenBatch.of(teacher[slice(*cut)])) for cut in cuts]
    columns = {name: [row for _, part, _ in parts for row in part[name]] for name in parts[0][1]}
    counts = {name: sum(part[name] for _, _, part in parts) for name in parts[0][2]}
    return TokenBatch.of(row for part, _, _ in parts for row in part), columns, counts


def align_rows(encoder: Encoder, rows: DocumentRows, teacher: TokenBatch) -> Aligned:
    """The student's tokens, the columns of the students table, and what the alignment counts.

    A document the teacher could not read has the status `teacher:REASON` and no tokens.
    """
    read = [status == OK for status in teacher.statuses]
    limits = [n if ok else None for n, ok in zip(teacher.num_chars.tolist(), read, strict=True)]
    encoded = encoder.encode_batch(rows.block, limits)
    both = zip(encoded.statuses, teacher.statuses, strict=True)
    statuses = [ours if theirs == OK else f"teacher:{theirs}" for ours, theirs in both]
    tokens = encoded.with_statuses(statuses)
    ends = Ragged(rows.block.segments.values[:, 1], rows.block.segments.first)
    student_spans, teacher_spans = align(tokens, teacher, ends)
    columns: dict[str, Any] = {
        "doc_id": rows.doc_ids,
        **token_columns(tokens),
        "student_spans": student_spans,
        "teacher_spans": teacher_spans,
        "word_tokens": token_ranges(tokens, rows.words),
        "phrase_tokens": token_ranges(tokens, rows.phrases),
    }
    student_sizes, teacher_sizes = (s.values[:, 1] - s.values[:, 0] for s in (student_spans, teacher_spans))
    usable = np.array([status == OK for status in tokens.statuses], bool)
    counts = {
        "spans": len(student_spans.values),
        "exact_pairs": int(((student_sizes == 1) & (teacher_sizes == 1)).sum()),
        "aligned_tokens": int(student_sizes.sum()),
        "cut_below_teacher": int((usable & (tokens.num_chars < teacher.num_chars)).sum()),
    }
    return tokens, columns, counts


def make_students(root: Path, name: str, teacher: str, settings: StudentSection, workers: Workers) -> Built:
    """Make the table students/NAME, aligned with teachers/TEACHER; `settings` have a tokenizer and no template "auto".

    Raises:
        InputMissing: The teacher table is not finished, or the tokenizer is not there.
        Mismatch: students/NAME was begun with other settings.
    """
    documents, teachers = Table(root, "documents"), Table(root, f"teachers/{teacher}")
    encoder = encoder_for(settings.tokenizer, settings, documents)
    spec = {
        "schema": STUDENTS_VERSION, "documents": documents.manifest.root, "encoder": encoder.identity(),
        "teacher": teacher, "teacher_root": teachers.manifest.root,
    }  # fmt: skip
    store = Store(root, f"students/{name}", spec)
    stage = AlignStage(root=root, folder=store.folder, teacher=f"teachers/{teacher}", settings=settings)

    def finish(_commits: Sequence[Commit]) -> tuple[dict[str, Any], dict[str, str]]:
        constants = {"template": settings.template, "vocab_size": len(encoder.tokenizer), "teacher": teacher}
        return constants, save_folder(store.folder / "tokenizer", encoder.tokenizer.save_pretrained)

    return build(store, stage, list, workers, finish=finish)
