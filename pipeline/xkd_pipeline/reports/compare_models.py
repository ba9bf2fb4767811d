"""Whether a teacher can help at all: how well it and the untrained student predict the targets of some rows."""

import gc
from collections.abc import Iterator
from typing import Any

from xkd_pipeline.reports.sample import Sample
from xkd_schemas.errors import BadData
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import OK
from xkd_trainer.models.bits_per_byte import bits_per_byte
from xkd_trainer.models.compute_dtype import choose_dtype, dtype_named, this_device
from xkd_trainer.models.forward import check_model
from xkd_trainer.models.loading import load_model


def compare_models(
    models: tuple[str, str], encoders: tuple[Encoder, Encoder], dtype: str, sample: Sample
) -> dict[str, Any]:
    """Bits per byte of teacher and student, in this order, over the same characters."""
    documents = sample.documents
    theirs = encoders[0].encode_batch(documents)
    ours = encoders[1].encode_batch(documents, [t.num_chars if t.status == OK else None for t in theirs])
    theirs = encoders[0].encode_batch(documents, [t.num_chars if t.status == OK else None for t in ours])
    usable = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a.status == OK and b.status == OK]
    if not usable:
        raise BadData("no row of the sample can be used by both models", fix="check the form of the rows")
    device = this_device()
    choice = choose_dtype(dtype, device)
    measured = []
    for name, rows in zip(models, (theirs, ours), strict=True):
        model = load_model(name, dtype=dtype_named(choice.dtype)).to(device)
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
