"""The commands that hand a finished cache to others: export, publish and fetch. cli.py registers them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xkd_schemas.terminal import say, say_json

CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.")]
AddressArgument = Annotated[str, typer.Argument(help="Any address fsspec knows: s3://bucket/cache, file:///mnt/c.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(
    cache: CacheArgument,
    parquet: Annotated[Path, typer.Option(help="New folder for Parquet files.")],
    as_json: JsonOption = False,
) -> None:
    """Write the tables as Parquet files; bf16 columns stay bits, which their metadata says.

    Example: xkd-cache export cache/ --parquet tables/
    """
    from xkd_pipeline.parquet import export_parquet

    _tell(export_parquet(cache, parquet), "{tables} tables, {bytes} bytes in {parquet}", as_json)


def publish(cache: CacheArgument, url: AddressArgument, as_json: JsonOption = False) -> None:
    """Copy a finished cache to an address, its manifests last.

    Example: xkd-cache publish cache/ s3://bucket/cache
    """
    from xkd_pipeline import remote

    _tell(remote.publish(cache, url), "{files} files, {bytes} bytes at {url}", as_json)


def fetch(
    url: AddressArgument,
    folder: Annotated[Path, typer.Argument(help="New folder for the cache.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a published cache to a new folder and check every file; run again after a break, it goes on.

    Example: xkd-cache fetch s3://bucket/cache cache/
    """
    from xkd_pipeline.fetch import fetch as bring

    _tell(bring(url, folder), "{bytes} bytes in {cache}, every digest right, {kept} files were there", as_json)


def _tell(values: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        say_json(values)
    else:
        say(line.format(**values))
