"""The columns that were released. A cache on somebody's disk is read by these."""

from pathlib import Path

import pyarrow as pa
import pytest

from xkd_schemas.documents import DOCUMENTS_READ, documents_schema
from xkd_schemas.signals import KINDS, TEACHERS_VERSION, Signal, teacher_schema
from xkd_schemas.tokens import STUDENTS, STUDENTS_VERSION

GOLDEN = Path(__file__).parents[2] / "golden"
EVERY = [
    Signal(name, 3 if k.layer else None, "word" if k.unit else None, 4 if k.top else None) for name, k in KINDS.items()
]
SCHEMAS = {
    **{f"documents_v{version}": documents_schema(version) for version in DOCUMENTS_READ},
    f"students_v{STUDENTS_VERSION}": STUDENTS,
    f"teachers_v{TEACHERS_VERSION}": teacher_schema(EVERY, 8),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_the_one_that_was_released(name: str) -> None:
    """If this fails you changed the format: bump the table's VERSION and add tests/golden/TABLE_vN.txt."""
    text = SCHEMAS[name].to_string(truncate_metadata=False, show_field_metadata=True) + "\n"

    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), (
        f"the {name.split('_')[0]} schema is no longer version {name[-1]}: bump its VERSION and add a golden file"
    )


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_column_can_be_null_and_every_list_has_64_bit_offsets(name: str) -> None:
    def inner(kind: pa.DataType) -> list[pa.Field]:
        return [kind.field(n) for n in range(kind.num_fields)]

    fields = list(SCHEMAS[name])
    while fields:
        field = fields.pop()
        assert not field.nullable, field
        assert not pa.types.is_list(field.type), field
        fields += inner(field.type)
