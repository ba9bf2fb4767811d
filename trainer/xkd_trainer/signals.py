"""A stable name for code outside; the module is `xkd_trainer.models.measures`."""

from xkd_trainer.models.measures import centrality

__all__ = ["centrality"]
