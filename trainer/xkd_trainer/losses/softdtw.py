"""A stable name for code outside; the module is `xkd_trainer.losses.ops.soft_dtw`."""

from xkd_trainer.losses.ops.soft_dtw import soft_dtw

__all__ = ["soft_dtw"]
