"""The commands that hand a finished cache to others. cli.py registers them."""

from pathlib import Path
from typing import Annotated

import typer

from xkd_schemas.console import say, say_json
from xkd_schemas.errors import UsageError

CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(
    cache: CacheArgument,
    parquet: Annotated[Path, typer.Option(help="New folder for Parquet files.")],
    as_json: JsonOption = False,
) -> None:
    """Write the tables as Parquet files; bf16 columns stay bits, which their metadata says.

    Example: xkd-cache export cache/ --parquet tables/
    """
    from xkd_pipeline.maintain.export_parquet import export_parquet

    values = export_parquet(cache, parquet)
    if as_json:
        say_json(values)
    else:
        say("{tables} tables, {bytes} bytes in {parquet}".format(**values))


def copied_by_others(context: typer.Context) -> None:
    """Say what took the place of publish and fetch."""
    raise UsageError(
        f"xkd-cache {context.info_name} is withdrawn",
        fix="copy the folder with hf upload, aws s3 sync or rclone, then xkd-cache verify (docs/sharing.md)",
    )
