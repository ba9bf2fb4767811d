"""Which levels MTA reads, and which student layer stands beside each (section 1.3 of METHODS, eq. 10).

A level is (teacher layer, word or phrase); layers are Hugging Face indices, 1 is the output of the first block.
"""

from xkd_schemas.errors import UsageError
from xkd_trainer.losses.mta import MtaSettings, phi, strided_layers
from xkd_trainer.methods.declaration import Context
from xkd_trainer.methods.layers import checked_student_layers

Picked = tuple[tuple[tuple[int, str], int], ...]


def picked_levels(settings: MtaSettings, context: Context) -> Picked:
    """(level, student layer) pairs, lowest level first.

    Raises:
        UsageError: A layer does not exist, lists have different lengths, or a picked level is not in the cache.
    """
    checked_student_layers("mta", settings.student_layers, context)
    return _strided(settings, context) if settings.pick == "strided" else _cached(settings, context)


def _cached(settings: MtaSettings, context: Context) -> Picked:
    """Every level of the cache."""
    if settings.student_layers and len(settings.student_layers) != len(context.levels):
        raise UsageError(
            f"mta.student_layers has {len(settings.student_layers)} layers, the cache has {len(context.levels)} "
            f"levels ({', '.join(f'{layer}:{unit}' for layer, unit in context.levels)})"
        )
    chosen = settings.student_layers or tuple(context.student_layer(layer) for layer, _ in context.levels)
    return tuple(zip(context.levels, chosen, strict=True))


def _strided(settings: MtaSettings, context: Context) -> Picked:
    """Student layers from the top down, each beside phi(l); the lowest on words."""
    chosen = settings.student_layers or strided_layers(context.student_layers, settings.num_layers, settings.stride)
    if min(chosen) < 1:
        raise UsageError(
            f"mta.pick=strided: {settings.num_layers} layers do not fit a student of {context.student_layers}",
            next="--set losses.mta.num_layers=N, or losses.mta.stride=N",
        )
    beside = [phi(layer, context.student_layers, context.teacher_layers) for layer in chosen]
    levels = [(layer, "phrase" if number else "word") for number, layer in enumerate(beside)]
    if len(set(levels)) < len(levels):
        raise UsageError(
            f"mta.pick=strided: student layers {', '.join(map(str, chosen))} stand beside teacher layers "
            f"{', '.join(map(str, beside))}, one of them twice",
            next="--set losses.mta.num_layers=N with fewer layers",
        )
    missing = [f"{layer}:{unit}" for layer, unit in levels if (layer, unit) not in context.levels]
    if missing:
        flags = f"--word-layers {beside[0]}"
        flags += f" --phrase-layers {','.join(map(str, beside[1:]))}" if beside[1:] else ""
        raise UsageError(
            f"mta.pick=strided puts student layers {', '.join(map(str, chosen))} beside "
            f"{', '.join(f'{layer}:{unit}' for layer, unit in levels)} of the teacher, and the cache lacks "
            f"{', '.join(missing)}",
            next=f"xkd-cache add CACHE --model M --for mta {flags}",
        )
    return tuple(zip(levels, chosen, strict=True))
