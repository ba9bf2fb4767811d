"""A teacher's table and the tables of signals beside it, read as one: their record batches lie side by side."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from xkd_schemas.cache.table import OPEN_SHARDS, Shard, Table
from xkd_schemas.errors import BadData
from xkd_schemas.ragged import Columns


class JoinedShard(Shard):
    """Shard of one table with the columns of others that hold the same documents in the same record batches."""

    def __init__(self, first: Shard, others: Sequence[Shard]) -> None:
        self.path, self.commit = first.path, first.commit
        self._shards = (first, *others)
        self._ends = first._ends
        self._columns: OrderedDict[int, Columns] = OrderedDict()
        self._decoders = {name: decode for shard in self._shards[::-1] for name, decode in shard._decoders.items()}
        fields = {field.name: field for shard in self._shards[::-1] for field in shard.schema}
        own = [field.name for field in first.schema]
        self._joined = pa.schema(
            [fields[name] for name in (*own, *sorted(set(fields) - set(own)))],
            metadata={k: v for shard in self._shards[::-1] for k, v in (shard.schema.metadata or {}).items()},
        )

    @property
    def schema(self) -> pa.Schema:
        """Columns of the first table, then those that only the others have, by name."""
        return self._joined

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number` of all tables side by side, each checked when first touched; nothing is copied.

        Raises:
            BadData: A batch is corrupt, or the tables hold other documents there.
        """
        batches = [shard.batch(number) for shard in self._shards]
        for shard, batch in zip(self._shards[1:], batches[1:], strict=True):
            if not batch.column("doc_id").equals(batches[0].column("doc_id")):
                raise BadData(
                    f"{shard.path}: record batch {number} holds other documents than {self.path}",
                    fix=f"delete {shard.path.parent} and add its signals again",
                )
        columns = {name: batch.column(name) for batch in batches[::-1] for name in batch.schema.names}
        arrays = [columns[name] for name in self._joined.names]
        return pa.RecordBatch.from_arrays(arrays, schema=self._joined)


class JoinedTable(Table):
    """A sealed table that gives its rows with the columns of `others`, which hold the same documents at least.

    Raises:
        InputMissing, BadData: as `Table`.
    """

    def __init__(self, root: Path, name: str, others: Sequence[Table]) -> None:
        super().__init__(root, name)
        self._others = tuple(others)
        self._joined: dict[int, Shard] = {}

    def shard(self, number: int) -> Shard:
        """Shard of unit `number`, with the columns of the other tables."""
        if number not in self._joined:
            others = [table.shard(number) for table in self._others]
            self._joined[number] = JoinedShard(super().shard(number), others)
            if len(self._joined) > OPEN_SHARDS:
                del self._joined[next(iter(self._joined))]
        return self._joined[number]
