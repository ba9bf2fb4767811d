"""The two models and the cache that benchmarks run on: the demo's, or random ones of the same shape made on the spot.

What is made here needs no download: text is the standard library's docstrings, tokenizers are trained on it, words and
phrases are runs of words, weights are random. Speed does not depend on what a model knows.
"""

import ast
import itertools
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import Options
from benchmarks.states import write_table
from xkd_pipeline.alignment import make_students
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import make_teacher, teacher_layers
from xkd_pipeline.parsing.stage import columns_of
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.cache.manifest import Unit
from xkd_schemas.cache.table import Table, names_in
from xkd_schemas.config import AUTO, RunConfig, StudentSection
from xkd_schemas.documents import DOCUMENTS, DOCUMENTS_VERSION, Document, Spans, document_of
from xkd_schemas.signals import Signal
from xkd_trainer.losses.declaration import Levels
from xkd_trainer.losses.registry import loss_named
from xkd_trainer.models.compute_dtype import choose_dtype, this_device

METHODS = ("mta", "sra", "dwa")
TEMPLATE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Where everything lies, and what it is."""

    teacher: str
    student: str
    """A folder, or new:FAMILY,..."""
    tokenizer: str
    cache: Path
    template: str

    def run_file(self, loss: str, *, out: Path = Path(), steps: int = 1, batch_size: int = 16) -> RunConfig:
        """A run that trains this student from this cache."""
        train = {"loss": loss, "out": str(out), "steps": steps, "batch_size": batch_size, "threads": 1}
        student = {"model": self.student, "tokenizer": self.tokenizer, "template": self.template}
        return RunConfig.model_validate({"cache": str(self.cache), "student": student, "train": train})


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a pair that is made here; the defaults are the demo's."""

    documents: int = 96
    characters: int = 400
    """Longest document."""
    teacher_layers: int = 30
    teacher_width: int = 576
    student_layers: int = 4
    student_width: int = 256
    teacher_classes: int = 49_152
    student_classes: int = 4_096

    def small(self) -> "Shape":
        """For --quick."""
        return Shape(
            documents=24, characters=200, teacher_layers=4, teacher_width=64, student_layers=4, student_width=64,
            teacher_classes=2_000, student_classes=1_000,
        )  # fmt: skip


def wanted_signals(num_layers: int, names: Sequence[str] = METHODS) -> list[Signal]:
    """What these losses and evaluation need of a teacher."""
    levels = Levels(teacher_layers(num_layers), num_layers=num_layers, states=())
    needed = {s for name in names for s in loss_named(name).needs(loss_named(name).parse({}), levels)}
    needed = {replace(s, top=8) if s.kind.top else s for s in needed}
    return sorted(needed | {Signal("argmax")}, key=lambda s: s.column)


def pair_of(options: Options, shape: Shape | None = None) -> Pair:
    """The demo's pair, or one of that shape made in the scratch folder; a given shape is always made."""
    if options.demo is not None and shape is None:
        demo = options.demo
        (student,) = names_in(demo / "cache", "students")
        encoder = Table(demo / "cache", f"students/{student}").manifest.spec["encoder"]
        return Pair(
            teacher=str(demo / "teacher"), student="new:llama,layers=4,width=256", tokenizer=str(demo / "tokenizer"),
            cache=demo / "cache", template=encoder["template"],
        )  # fmt: skip
    shape = shape or Shape()
    return made(options.scratch / "pair", shape.small() if options.quick else shape)


def made(
    folder: Path, shape: Shape, texts: Iterable[str] = (), names: Sequence[str] = METHODS, tokens: int = 1024
) -> Pair:
    """Random teacher and student with tokenizers of different kinds, and the cache of both, for the losses `names`."""
    texts = texts or itertools.islice(texts_of(shape.characters), shape.documents)
    documents = list(_documents(texts))
    pieces = [d.text for d in documents]
    teacher, student = folder / "teacher", folder / "student"
    disable_progress_bar()
    torch.manual_seed(0)
    _save(teacher, _byte_level(pieces, min(shape.teacher_classes, 2_000)), shape.teacher_layers, shape.teacher_width,
          shape.teacher_classes)  # fmt: skip
    _save(student, _unigram(pieces, min(shape.student_classes, 1_000)), shape.student_layers, shape.student_width,
          shape.student_classes)  # fmt: skip
    cache, alone = folder / "cache", Workers()
    columns = columns_of(documents, [_spans(d) for d in documents])
    units = (Unit(source="standard library", first=0, rows=len(documents)),)
    write_table(cache, "documents", {"schema": DOCUMENTS_VERSION}, DOCUMENTS, columns, units)
    settings = TeacherSettings(model=str(teacher), dtype=fast_dtype(), template=TEMPLATE, max_tokens=tokens)
    make_teacher(cache, "teacher", settings, partial(wanted_signals, names=names), alone)
    own = StudentSection(tokenizer=str(student), template=TEMPLATE, max_tokens=settings.max_tokens)
    make_students(cache, "student", "teacher", own, alone)
    return Pair(teacher=str(teacher), student=str(student), tokenizer=str(student), cache=cache, template=TEMPLATE)


def fast_dtype() -> str:
    """What a teacher runs in here unless it is told otherwise."""
    return choose_dtype(AUTO, this_device()).dtype


def texts_of(characters: int) -> Iterator[str]:
    """Docstrings of the standard library, cut; those of less than half the length are left out."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        for text in filter(None, map(ast.get_docstring, nodes)):
            if len(text) >= characters // 2:
                yield text[:characters]


def _documents(texts: Iterable[str]) -> Iterator[Document]:
    """The first third of each text is the prompt, the rest the response."""
    for number, text in enumerate(texts, start=1):
        third = len(text) // 3
        parts = [("prompt", text[:third], False), ("response", text[third:], True)]
        yield document_of(parts, source="standard library", line=number)


def _spans(document: Document) -> Spans:
    """Words, and as phrases every second pair of neighbouring words of a segment."""
    found = [
        [(m.start() + s.start, m.end() + s.start) for m in re.finditer(r"\w+", document.text[s.start : s.end])]
        for s in document.segments
    ]
    phrases = [(a[0], b[1]) for words in found for a, b in zip(words[::3], words[1::3], strict=False)]
    words = tuple(word for words in found for word in words)
    return Spans(words=words, phrases=tuple(phrases), labels=("NP",) * len(phrases))


def _save(folder: Path, tokenizer: Tokenizer, layers: int, width: int, classes: int) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=classes, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


def _byte_level(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
