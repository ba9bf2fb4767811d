"""A student's token intervals and their alignment with the teacher's tokens, against tokenising the same text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.assets import Assets, assets_of
from benchmarks.measure import Options, interleaved
from benchmarks.rows import Result, cost
from xkd_pipeline.align import StudentSettings, align_rows, tokens_at
from xkd_pipeline.documents import document_at
from xkd_schemas.alignment import align
from xkd_schemas.documents import Document
from xkd_schemas.encode import Encoder
from xkd_schemas.table import Row, Table
from xkd_schemas.tokens import OK, Int32s, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Documents that both models can read."""

    encoder: Encoder
    rows: Sequence[Row]
    documents: Sequence[Document]
    teacher: Sequence[Tokens]


def run(options: Options) -> list[Result]:
    """Documents spread over the whole cache."""
    work = work_of(assets_of(options, layers=4), documents=options.size(512, 8))
    calls: dict[str, Callable[[], object]] = {
        "tokenise": lambda: tokenised(work),
        "align": lambda: aligned(work),
        "stage": lambda: align_rows(work.encoder, work.rows, work.teacher),
    }
    seconds = interleaved(calls, options.repeats)
    tokens = sum(len(ids) for ids in tokenised(work))
    what = f"{len(work.documents)} documents, {tokens} tokens"
    alone = seconds["tokenise"]
    return [
        cost(f"{what}: intervals and alignment / tokenising", seconds["align"] - alone, alone, bar=0.2),
        cost(f"{what}: the align stage without its file, tokenising left out / tokenising",
             seconds["stage"] - alone, alone),
    ]  # fmt: skip


def work_of(assets: Assets, documents: int) -> Work:
    """The only student of the cache, and some documents."""
    (folder,) = (assets.cache / "students").iterdir()
    spec = Table(assets.cache, f"students/{folder.name}").manifest.spec
    settings = StudentSettings(tokenizer=str(assets.tokenizer), template=spec["encoder"]["template"])
    teachers, table = Table(assets.cache, f"teachers/{spec['teacher']}"), Table(assets.cache, "documents")
    chosen = np.linspace(0, len(table) - 1, min(documents, len(table))).astype(int).tolist()
    usable = [i for i in chosen if teachers[i]["status"] == OK]
    rows = [table[i] for i in usable]
    return Work(
        encoder=settings.encoder(),
        rows=rows,
        documents=[document_at(row) for row in rows],
        teacher=[tokens_at(teachers[i]) for i in usable],
    )


def tokenised(work: Work) -> list[list[int]]:
    """Ids of every segment from the tokenizer's own library, offsets not asked for."""
    texts = [d.text[s.start : s.end] for d in work.documents for s in d.segments]
    backend = work.encoder.tokenizer.backend_tokenizer
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def aligned(work: Work) -> list[tuple[Int32s, Int32s]]:
    """Our tokens of every document, and the spans they share with the teacher's."""
    limits = [t.num_chars for t in work.teacher]
    encoded = work.encoder.encode_batch(work.documents, limits)
    ends = [np.array([s.end for s in d.segments]) for d in work.documents]
    return [align(s, t, e) for s, t, e in zip(encoded, work.teacher, ends, strict=True)]
