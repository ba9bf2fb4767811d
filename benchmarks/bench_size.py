"""Bytes a token for MTA, SRA and DWA-KD, against bfloat16 states of the same layers and full bfloat16 logits.

Once by the plan's arithmetic, at a teacher of width 4096 with 152,000 classes and four layers, on the words, phrases
and tokens of the pair's documents; and once by a real run of a small teacher whose logits and states stand in the same
ratio. Codec bf16: nothing is rounded on either side.
"""

from collections import Counter

from benchmarks.measure import Options, Result, Row, ratio
from benchmarks.pair import METHODS, TEMPLATE, Pair, Shape, fast_dtype, made, pair_of
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import make_teacher
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.table import Table, names_in
from xkd_schemas.codecs import PLAIN
from xkd_schemas.signals import Signal, count_values, signal_bytes
from xkd_schemas.tokens import tokens_at
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.registry import loss_named

WIDTH, CLASSES = 4096, 152_000
SHARE = 1 / 10
TOKEN_BYTES = 13.125
"""Id, interval, kind and target of a token: what a teacher table has beside its signals."""


def levels_of(num_layers: int) -> Levels:
    """Four layers: words in the middle, phrases at a quarter, three quarters and the top."""
    quarter = num_layers // 4
    pairs = ((quarter, "phrase"), (2 * quarter, "word"), (3 * quarter, "phrase"), (num_layers, "phrase"))
    return Levels(pairs, num_layers=num_layers, states=())


def signals(num_layers: int) -> list[Signal]:
    """What the three methods need at these layers, and what evaluation needs."""
    found = {s for name in METHODS for s in loss_named(name).needs(loss_named(name).parse({}), levels_of(num_layers))}
    return sorted(found | {Signal("argmax")}, key=lambda s: s.column)


def run(options: Options) -> list[Result]:
    """Both rows."""
    small = Shape(
        documents=options.size(96, 24), characters=options.size(400, 200), teacher_layers=4,
        teacher_width=options.size(512, 64), teacher_classes=options.size(19_000, 2_375), student_layers=1,
        student_width=64, student_classes=1_000,
    )  # fmt: skip
    return [by_arithmetic(pair_of(options)), by_a_run(made(options.scratch / "size", small), small)]


def naive_bytes(tokens: int, layers: int, width: int, classes: int) -> int:
    """bfloat16 states of so many layers and full bfloat16 logits of so many tokens.

    >>> naive_bytes(1, layers=4, width=4096, classes=152_000)
    336768
    """
    return tokens * 2 * (layers * width + classes)


def by_arithmetic(pair: Pair) -> Row:
    """Width 4096, 152,000 classes, on what the pair's teacher table says its documents are made of."""
    counts, documents = counted(pair)
    tokens = counts["T"]
    sizes = (signal_bytes(signal, WIDTH, PLAIN, counts, documents) for signal in signals(32))
    ours = TOKEN_BYTES * tokens + sum(sizes)
    return _row("arithmetic, D=4096, V=152k, 4 layers", ours / tokens, naive_bytes(1, 4, WIDTH, CLASSES))


def counted(pair: Pair) -> tuple[Counter[str], int]:
    """Values of every kind of signal in the pair's cache, and its documents."""
    teacher = Table(pair.cache, f"students/{names_in(pair.cache, 'students')[0]}").manifest.spec["teacher"]
    rows = zip(Table(pair.cache, "documents"), Table(pair.cache, f"teachers/{teacher}"), strict=True)
    counts = [count_values(tokens_at(read), row["words"], row["phrases"]) for row, read in rows]
    return sum(counts, Counter()), len(counts)


def by_a_run(pair: Pair, shape: Shape) -> Row:
    """The shards that a capture wrote, file frames and all."""
    settings = TeacherSettings(model=pair.teacher, dtype=fast_dtype(), template=TEMPLATE)
    built = make_teacher(pair.cache, "four", settings, signals, Workers())
    tokens = built.manifest.count("tokens")
    ours = sum(commit.size for commit in built.manifest.commits)
    naive = naive_bytes(1, 4, shape.teacher_width, shape.teacher_classes)
    what = f"a real run, D={shape.teacher_width}, V={shape.teacher_classes}, 4 layers"
    return _row(what, ours / tokens, naive)


def _row(what: str, ours: float, naive: float) -> Row:
    return ratio(
        f"cache for mta, sra, dwa / bf16 states and full logits: {what}", ours, naive, "bytes a token", bar=SHARE
    )
