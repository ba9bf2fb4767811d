"""What names a run: all that decides which student comes out. Checkpoints and `xkd.json` hold it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from xkd_schemas.cache.manifest import refuse_differences
from xkd_schemas.config import RunConfig
from xkd_schemas.text.encode import reading_of
from xkd_trainer.data.sampler import ORDER
from xkd_trainer.models.lora import is_adapted, weights_identity
from xkd_trainer.training.held_out import EVALUATION
from xkd_trainer.training.prepare import Ready

FIRST_KEYS: Final = {
    "loss", "epochs", "steps", "batch_size", "micro_batch_size", "lr", "projector_lr", "min_lr_ratio", "warmup_ratio",
    "weight_decay", "max_grad_norm", "seed", "mixed_precision", "save_dtype",
}  # fmt: skip
"""Settings that every checkpoint names; a later one is named where it has not its default."""
NOT_THE_RESULT: Final = {"out", "shards", "threads", "log_every", "save_every", "track", *EVALUATION}


def fingerprint_of(run: RunConfig, ready: Ready, total: int) -> dict[str, Any]:
    """What names a run of `total` steps, without its held-out rows; JSON can hold it."""
    reading = reading_of(ready.cache.students.manifest.spec["encoder"])
    dumped = run.train.model_dump(mode="json", exclude=NOT_THE_RESULT)
    changed = run.train.model_dump(exclude_defaults=True)
    train = {key: value for key, value in dumped.items() if key in FIRST_KEYS or key in changed}
    weights = run.student.model_dump(include={"dtype", "quantization"}, exclude_defaults=True)
    return {
        "cache": ready.cache.identity(ready.wanted),
        "student": run.student.model,
        "template": reading["template"],
        "losses": {name: dict(values) for name, values in sorted(run.losses.items())},
        "weights": ready.distiller.term_weights(total - 1),
        "projectors": {n: how.model_dump() for n, how in ready.distiller.trained_projectors().items()},
        "steps": total,
        "order": ORDER,
        "train": train,
        **({} if reading["enable_thinking"] is None else {"enable_thinking": reading["enable_thinking"]}),
        **({"student_weights": weights} if weights else {}),
        **({"base": weights_identity(run.student.model)} if is_adapted(ready.distiller.student) else {}),
    }


def refuse_another_run(out: Path, ours: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> None:
    """Mismatch where the checkpoint or student (`what`) in `out` is of a run with another fingerprint than `ours`.

    The size of a micro-batch, and which student is exported at the end, may be decided again.
    """
    train = {**saved["train"], "micro_batch_size": ours["train"]["micro_batch_size"]}
    found, named = (
        {**each, "evaluation": {name: value for name, value in each.get("evaluation", {}).items() if name != "best"}}
        for each in ({**saved, "train": train}, ours)
    )
    refuse_differences(out, named, found, advice="choose another --out, or the same settings", what=what)
