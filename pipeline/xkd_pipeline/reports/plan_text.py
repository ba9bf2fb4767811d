"""A plan in lines for people."""

from collections.abc import Iterator
from typing import Any

SUFFIXES = ("B", "kB", "MB", "GB", "TB", "PB")


def shown(size: float) -> str:
    """A size in steps of 1000.

    >>> shown(999), shown(1_234_567)
    ('999 B', '1.2 MB')
    """
    step = 0
    while abs(size) >= 999.5 and step < len(SUFFIXES) - 1:
        size, step = size / 1000, step + 1
    return f"{size:.0f} B" if step == 0 else f"{size:.1f} {SUFFIXES[step]}"


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """Lines of `make_plan`'s result."""
    yield from plan["corpus"]
    yield from _what_was_read(plan)
    yield ""
    yield f"{'kept, codec ' + plan['codec']:<28}{'bytes a token':>14}{'corpus':>12}"
    for column in plan["columns"]:
        yield f"{column['column']:<28}{column['bytes_per_token']:>14.1f}{shown(column['bytes']):>12}"
    yield f"{'teachers/':<28}{plan['bytes_per_token']:>14.1f}{shown(plan['teacher_bytes']):>12}"
    yield f"{'documents/':<42}{shown(plan['documents_bytes']):>12}"
    students = plan["students_bytes"]
    yield f"{'students/':<42}" + (f"{shown(students):>12}" if students is not None else "  not counted: no --student")
    yield f"{'tokenizers':<42}{shown(plan['tokenizers_bytes']):>12}"
    yield f"{'head and embeddings':<42}{shown(plan['files_bytes']):>12}"
    yield ""
    yield from _needs(plan)
    yield from _steps(plan)


def _what_was_read(plan: dict[str, Any]) -> Iterator[str]:
    sample, model = plan["sample"], plan["model"]
    why = f" ({sample['reasons']})" if sample["reasons"] else ""
    yield (
        f"sample: {sample['rows']} of {plan['rows']} rows, {sample['rejected']} rejected{why}, {sample['unusable']} "
        f"unreadable for the teacher, {sample['cut']} cut to its length"
    )
    yield (
        f"teacher: {model['architecture']}, {model['layers']} layers, width {model['width']}, {model['classes']} "
        f"classes, {model['weights'] / 1e6:.1f} M weights in {plan['dtype']}; its configuration was read, no weight"
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


def _needs(plan: dict[str, Any]) -> Iterator[str]:
    fits = "fits" if plan["bytes"] <= plan["free"] else "DOES NOT FIT"
    yield f"needed: {shown(plan['bytes'])}; free on that disk: {shown(plan['free'])}: {fits}"
    naive = plan["naive"]
    if naive["share"] is not None:
        layers = f"states of layers {', '.join(map(str, naive['layers']))} and " if naive["layers"] else ""
        yield (
            f"bfloat16 {layers}full logits of every token would need {shown(naive['bytes'])}; "
            f"teachers/ is {naive['share']:.3f} of it"
        )
    yield f"shards: {plan['shards']} of {shown(plan['shard_bytes'])}"
    parts = ", ".join(f"{name} {shown(size)}" for name, size in plan["memory"].items())
    yield f"memory of one worker, an estimate: {shown(plan['memory_bytes'])} ({parts})"
    if plan["seconds"] is None:
        yield (
            "time: not known. Run xkd-cache teacher on a few hundred rows, divide its tokens by its seconds, and "
            "give that with --tokens-per-second"
        )
    else:
        hours, rest = divmod(round(plan["seconds"]), 3600)
        yield f"time: {hours}:{rest // 60:02d}:{rest % 60:02d} at {plan['rate']:g} tokens a second, with one worker"


def _steps(plan: dict[str, Any]) -> Iterator[str]:
    budget = plan["budget"]
    if budget is None:
        return
    if plan["bytes"] <= budget:
        yield f"budget {shown(budget)}: kept, nothing to go down for"
        return
    if plan["files_bytes"] > budget:
        yield (
            f"budget {shown(budget)}: head and embeddings alone take {shown(plan['files_bytes'])}, whatever is kept "
            "of the corpus: give more, or take a teacher with fewer classes or a smaller width"
        )
        return
    yield f"budget {shown(budget)}: {shown(plan['bytes'] - budget)} too much. Ways down, one after the other:"
    for step in plan["steps"]:
        kept = "; within the budget" if step["fits"] else ""
        yield f"  {step['flags']}: {shown(step['bytes'])}{kept}. Cost: {step['cost']}"
    if not any(step["fits"] for step in plan["steps"]):
        yield "  No step is enough: use fewer documents or a lower --max-tokens"
