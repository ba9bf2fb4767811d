"""A stable name for code outside; the module is `xkd_schemas.text.alignment`."""

from xkd_schemas.text.alignment import common_boundaries

__all__ = ["common_boundaries"]
