"""A plan in lines for people, and sizes as people write them."""

import re
from collections.abc import Iterator
from typing import Any, Final

from rich.filesize import decimal

from xkd_schemas.errors import UsageError
from xkd_schemas.progress import show_time

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?")


def parse_size(text: str) -> int:
    """A size as people write it; GB is 10^9 bytes, GiB 2^30.

    >>> parse_size("200GB"), parse_size("1.5 MiB")
    (200000000000, 1572864)
    """
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None:
        raise UsageError(f"{text!r} is not a size", fix="e.g. --budget 200GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))


def format_size(size: float) -> str:
    """A size in steps of 1000, such as 1.2 MB."""
    return decimal(round(size))


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """Lines of `make_plan`'s result."""
    yield from plan["corpus"]
    yield from _describe_sample(plan)
    yield ""
    yield f"{'kept, codec ' + plan['codec']:<28}{'bytes per token':>16}{'corpus':>12}  needed by"
    for column in plan["columns"]:
        size = format_size(column["bytes"])
        losses = ", ".join(column["losses"])
        yield f"{column['column']:<28}{column['bytes_per_token']:>16.1f}{size:>12}  {losses}".rstrip()
    yield f"{'teachers/':<28}{plan['bytes_per_token']:>16.1f}{format_size(plan['teacher_bytes']):>12}"
    for title, name in (("documents/", "documents"), ("students/", "students"), ("tokenizers", "tokenizers"),
                        ("head and embeddings", "files")):  # fmt: skip
        size = plan[f"{name}_bytes"]
        yield f"{title:<44}" + ("  not counted: no --student" if size is None else f"{format_size(size):>12}")
    yield ""
    yield from _describe_needs(plan)
    if plan["budget"] is not None:
        yield from _advise(plan)


def _describe_sample(plan: dict[str, Any]) -> Iterator[str]:
    sample, model = plan["sample"], plan["model"]
    why = f" ({sample['reasons']})" if sample["reasons"] else ""
    yield (
        f"sample: {sample['rows']} of {plan['rows']} rows, {sample['rejected']} rejected{why}, {sample['unusable']} "
        f"unusable for the teacher, {sample['cut']} cut to its length"
    )
    yield (
        f"teacher: {model['architecture']}, {model['layers']} layers, width {model['width']}, {model['classes']} "
        f"classes, {model['weights'] / 1e6:.1f} M weights in {plan['dtype']}; only its configuration was read"
    )
    if "quantization" in model:
        yield (
            f"quantised: {model['quantization']['quant_method']}; what that costs is measured by "
            "xkd-cache verify --recompute K --model FULL"
        )
    yield f"template: {plan['template']}"
    yield f"dtype: {plan['dtype']}, {plan['dtype_why']}"
    if plan["dtype_warning"]:
        yield f"warning: {plan['dtype_warning']}"
    of = "in the corpus"
    if sample["rows"] < plan["rows"]:
        of += f", give or take {100 * plan['give_or_take']:.0f} % as this sample varies (a larger --sample is closer)"
    yield (
        f"{plan['tokens']} tokens, {plan['targets']} of them predicted, {plan['words']} words, "
        f"{plan['phrases']} phrases {of}"
    )


def _describe_needs(plan: dict[str, Any]) -> Iterator[str]:
    fits = "fits" if plan["bytes"] <= plan["free"] else "DOES NOT FIT"
    yield f"needed: {format_size(plan['bytes'])}; free on that disk: {format_size(plan['free'])}: {fits}"
    yield f"shards: {plan['shards']} of {format_size(plan['shard_bytes'])}"
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in plan["memory"].items())
    yield f"memory of one worker, an estimate: {format_size(plan['memory_bytes'])} ({parts})"
    if plan["stream"]:
        yield from _describe_stream(plan["stream"])
    elif plan["seconds"] is None:
        yield (
            "time: not known. Run xkd-cache teacher on a few hundred rows, and give the tokens per second of its last "
            "line with --tokens-per-second"
        )
    else:
        yield f"time: {show_time(plan['seconds'])} at {plan['rate']:g} tokens per second"


def _describe_stream(stream: dict[str, Any]) -> Iterator[str]:
    yield f"the teacher's blocks are read from disk one after another: {stream['why']}"
    yield (
        f"group for which a block is read once: a shard of {stream['group_tokens']:,} tokens, whose states take "
        f"{format_size(stream['group_bytes'])} between two blocks; documents.rows_per_shard=N sets it"
    )
    disk = f"{format_size(stream['disk_rate'])} per second, {'measured' if stream['disk_measured'] else 'assumed'}"
    rate = f"{stream['compute_rate']:.3g} tokens per second, {'as given' if stream['rate_given'] else 'by arithmetic'}"
    read, compute = (show_time(stream[f"{what}_seconds"]) for what in ("read", "compute"))
    yield f"time: reading {read} ({disk}), computing {compute} ({rate}), both at once: {stream['limit']} is the limit"


def _advise(plan: dict[str, Any]) -> Iterator[str]:
    budget, excess = plan["budget"], plan["bytes"] - plan["budget"]
    if excess <= 0:
        yield f"budget {format_size(budget)}: the cache fits"
        return
    yield f"budget {format_size(budget)}: the cache is {format_size(excess)} too large. What to change:"
    smaller = [f"--codec {codec} needs {format_size(size)}" for codec, size in plan["codecs"].items()]
    yield f"  {'; '.join(smaller)}: bf16-planes loses nothing, int8 rounds states to 255 steps"
    yield (
        "  drop a loss from --for, or name fewer --word-layers and --phrase-layers: the table above begins with the "
        "largest signals; --set losses.mta.hid=off drops span_vectors; rskd, for one tokenizer, needs no hidden_last"
    )
    once = plan["files_bytes"] + plan["tokenizers_bytes"]
    if once < budget:
        yield f"  keep {100 * (budget - once) / (plan['bytes'] - once):.0f} % of the documents, or lower --max-tokens"
    else:
        yield f"  head, embeddings and tokenizers alone take {format_size(once)}: use a teacher with fewer classes"
