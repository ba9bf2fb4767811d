"""Names of the dtypes a model runs in."""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator

AUTO: Final = "auto"
_OTHER_NAMES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(name: Any) -> Any:
    """The full name of a dtype; anything else as it is.

    >>> dtype_name("bf16"), dtype_name("auto")
    ('bfloat16', 'auto')
    """
    return _OTHER_NAMES.get(name, name) if isinstance(name, str) else name


DtypeName = Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(dtype_name)]
"""auto is what the hardware at hand computes fast."""
