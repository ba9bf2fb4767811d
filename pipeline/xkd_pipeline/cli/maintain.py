"""The commands that look after a finished cache: verify, repair, gc, drop. app.py registers them."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from xkd_schemas.cache.table import only_teacher
from xkd_schemas.console import answer
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.flags import JsonOption

CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.")]


def verify(
    cache: CacheArgument,
    level: Annotated[str, typer.Option(help="quick, full or deep.")] = "full",
    recompute: Annotated[int, typer.Option(min=0, help="Rows to compare with the live teacher.")] = 0,
    model: Annotated[str, typer.Option(help="The teacher, for --recompute.")] = "",
    teacher: Annotated[str, typer.Option(help="Name of the teacher's table, if there are several.")] = "",
    dtype: Annotated[
        str, typer.Option(help="Of the live teacher: auto (the table's, float32 where that is slow), float32, ...")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check every file of a cache; each bad file is named with its reason, and the exit code is 65.

    Example: xkd-cache verify cache/ --level deep
    """
    from dataclasses import asdict

    from xkd_pipeline.maintain.verify import verify as check

    if recompute and not model:
        raise UsageError("--recompute needs the teacher", fix="add --model FOLDER")
    bad, whole = check(cache, level), f"{cache} is whole ({level})"
    values: dict[str, Any] = {"level": level, "recomputed": 0, "not_compared": [], "differences": {}}
    if recompute and not bad:
        from xkd_pipeline.maintain.recompute import recompute as compare

        live = compare(cache, f"teachers/{teacher or only_teacher(cache)}", model, recompute, dtype)
        bad, whole = live.bad, f"{whole[:-1]}, {live.rows} rows recomputed in {live.dtype}: {live.line})"
        values |= {"recomputed": live.rows, "not_compared": live.skipped, "differences": live.differences}
    lines, skipped = [one.line for one in bad], values["not_compared"]
    lines += [f"not compared, because they may differ: {', '.join(skipped)}"] if skipped else []
    lines += [] if bad else [whole]
    answer(values | {"bad": [asdict(one) for one in bad], "whole": not bad}, lines, as_json)
    if bad:
        problems = "problem" if len(bad) == 1 else "problems"
        _end(f"{len(bad)} {problems} found", cache, f"xkd-cache repair {cache}", as_json)


def _end(what: str, cache: Path, fix: str, as_json: bool) -> NoReturn:
    """Exit with 65, and with one line where no JSON says it."""
    if as_json:
        raise typer.Exit(BadData.exit_code)
    raise BadData(f"{what} in {cache}", fix=fix)


def repair(
    cache: CacheArgument,
    corpus: Annotated[list[str] | None, typer.Option(help="What the documents were read from; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="The teacher of a bad table; repeatable.")] = None,
    spacy_model: Annotated[str | None, typer.Option(help="spaCy pipeline of the documents.")] = None,
    parser_model: Annotated[str | None, typer.Option(help="Folder of the benepar model.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray actors; 0 works in this process.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make the bad shards again and no other; without the corpus or teacher they need, print the command to type.

    Example: xkd-cache repair cache/ --corpus train.jsonl --model models/teacher
    """
    from dataclasses import asdict

    from xkd_pipeline.maintain.repair import repair as repair_cache
    from xkd_pipeline.workers.contract import Workers

    named = {"spacy_model": spacy_model, "parser_model": parser_model}
    parser = {field: name for field, name in named.items() if name is not None}
    done = repair_cache(cache, Workers(count=workers), corpus=corpus or (), models=model or (), parser=parser)
    lines = [one.line for one in done.bad]
    lines += [f"{name}: {shards} shards made again" for name, shards in done.made.items()]
    lines += [f"to run: {command}" for command in done.commands]
    found = {"bad": [asdict(b) for b in done.bad], "left": [asdict(b) for b in done.left]}
    values = found | {"made": done.made, "commands": done.commands}
    answer(values, lines if done.left else [*lines, f"{cache} is whole"], as_json)
    if done.left:
        _end(f"{len(done.left)} problems left", cache, "run what is listed above", as_json)


def gc(
    cache: CacheArgument,
    older_than: Annotated[float, typer.Option(min=0, help="Hours that quarantined files are kept.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what nothing refers to: loose shards, leftovers of writers that died, old quarantine.

    Example: xkd-cache gc cache/ --dry-run
    """
    from xkd_pipeline.maintain.gc import collect

    found = collect(cache, older_than=older_than, dry_run=dry_run)
    size = sum(one.size for one in found)
    files = [{"file": str(one.file.relative_to(cache)), "bytes": one.size, "why": one.why} for one in found]
    lines = ["{file}: {bytes} bytes, {why}".format(**file) for file in files]
    lines += [f"{'would free' if dry_run else 'freed'} {size / 1e6:.1f} MB in {len(found)} files"]
    answer({"files": files, "bytes": size, "removed": not dry_run}, lines, as_json)


def drop(
    cache: CacheArgument,
    table: Annotated[str, typer.Argument(help="teachers/NAME, signals/NAME or students/NAME.")],
    as_json: JsonOption = False,
) -> None:
    """Remove one table that no other table was made from; the rest stays whole.

    Example: xkd-cache drop cache/ students/NAME
    """
    from xkd_pipeline.maintain.gc import drop as remove

    size = remove(cache, table)
    answer({"table": table, "bytes": size}, [f"dropped {table}, freed {size / 1e6:.1f} MB"], as_json)


def copied_by_others(context: typer.Context) -> None:
    """Say what took the place of publish and fetch."""
    raise UsageError(
        f"xkd-cache {context.info_name} is withdrawn",
        fix="copy the folder with hf upload, aws s3 sync or rclone, then xkd-cache verify (docs/sharing.md)",
    )
