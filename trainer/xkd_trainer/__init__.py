"""A cache becomes a student: the losses, training and evaluation.

May import: schemas.
Lost without it: training, and the signals that the losses declare.
"""

from typing import TYPE_CHECKING

from xkd_schemas import lazy_names

if TYPE_CHECKING:
    from xkd_trainer.bridge import CacheDataset, Collator, DistillMixin, DistillTrainer
    from xkd_trainer.data.batch import Batch
    from xkd_trainer.evaluation import Request
    from xkd_trainer.evaluation import evaluate_student as evaluate
    from xkd_trainer.losses.declaration import Declaration
    from xkd_trainer.losses.ops.term import LossTerm
    from xkd_trainer.training.distiller import Distiller
    from xkd_trainer.training.loop import train
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "Batch": "xkd_trainer.data.batch:Batch",
            "CacheDataset": "xkd_trainer.bridge:CacheDataset",
            "Collator": "xkd_trainer.bridge:Collator",
            "Declaration": "xkd_trainer.losses.declaration:Declaration",
            "DistillMixin": "xkd_trainer.bridge:DistillMixin",
            "DistillTrainer": "xkd_trainer.bridge:DistillTrainer",
            "Distiller": "xkd_trainer.training.distiller:Distiller",
            "LossTerm": "xkd_trainer.losses.ops.term:LossTerm",
            "Request": "xkd_trainer.evaluation:Request",
            "evaluate": "xkd_trainer.evaluation:evaluate_student",
            "train": "xkd_trainer.training.loop:train",
        },
    )

__all__ = [
    "Batch", "CacheDataset", "Collator", "Declaration", "DistillMixin", "DistillTrainer", "Distiller", "LossTerm",
    "Request", "evaluate", "train",
]  # fmt: skip
