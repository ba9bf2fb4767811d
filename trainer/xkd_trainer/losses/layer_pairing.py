"""Which student layer stands beside which teacher layer, for losses that name layers.

Layers are Hugging Face indices, 1 is the output of the first block.
"""

from collections.abc import Sequence

from xkd_schemas.errors import UsageError
from xkd_trainer.losses.declaration import Context


def checked_student_layers(name: str, layers: Sequence[int], context: Context) -> None:
    """UsageError where the student has no such layer."""
    for layer in layers:
        if not 1 <= layer <= context.student_layers:
            raise UsageError(
                f"{name}.student_layers: layer {layer} does not exist, the student has layers 1 to "
                f"{context.student_layers}"
            )


def paired_layers(
    name: str, teacher_layers: Sequence[int], student_layers: Sequence[int], context: Context
) -> tuple[tuple[int, int], ...]:
    """(teacher layer, student layer) pairs, lowest teacher layer first; without `student_layers` at the same depth.

    Raises:
        UsageError: A layer does not exist, the lists have different lengths, or two pairs have the same layer.
    """
    for layer in teacher_layers:
        if not 1 <= layer <= context.teacher_layers:
            raise UsageError(
                f"{name}.layers: layer {layer} does not exist, the teacher has layers 1 to {context.teacher_layers}"
            )
    if student_layers and len(student_layers) != len(teacher_layers):
        raise UsageError(
            f"{name}.student_layers has {len(student_layers)} layers for the teacher's "
            f"{', '.join(map(str, sorted(teacher_layers)))}",
            fix=f"give {name}.layers and {name}.student_layers in the same number, lowest first",
        )
    checked_student_layers(name, student_layers, context)
    below = sorted(teacher_layers)
    beside = tuple(student_layers) or tuple(context.student_layer(layer) for layer in below)
    for side in (below, beside):
        if len(set(side)) < len(side):
            pairs = ", ".join(f"{s} beside {t}" for t, s in zip(below, beside, strict=True))
            raise UsageError(
                f"{name} would read a layer twice (student beside teacher layer: {pairs})",
                fix=f"--set losses.{name}.layers=[...] with fewer layers, or losses.{name}.student_layers=[...]",
            )
    return tuple(zip(below, beside, strict=True))
