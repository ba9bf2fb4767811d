"""Tiny teachers and students with the tokenizers of four_tokenizers, a tiny corpus, and a tiny cache made from both.

Weights are random and large enough that attention and predictions are far from uniform. Nothing comes from a network.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from four_tokenizers import fresh as fresh
from four_tokenizers import tokenizer_of as tokenizer_of
from small_cache import SPACY as SPACY
from small_cache import session_folder, write_rows
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig

TEACHER_TOKENIZER = "byte_level"
STUDENT_TOKENIZER = "sentencepiece"

PAIRS = (
    ("Who lit the lamp?", "The old keeper lit the lamp on the harbour wall every evening."),
    ("Where did he go?", "He moved to the city with his sister."),
    ("What did they count?", "They counted 12,345 birds and 67 boats."),
    ("Write a short answer.", "The capital of the country has two bridges."),
    ("How is the river?", "The river flows slowly and the weather is good."),
    ("Tell me about the fisherman.", "A fisherman laughed and said nothing at all."),
    ("What does the program print?", "It prints the area: 42.0 metres."),
    ("Who answered?", "Nobody answered."),
    ("When were the bridges built?", "In 1987 they built 8 bridges within 90 minutes."),
    ("Describe the morning.", "Good morning, said the old family near the naïve café."),
    ("What is on the table?", "The quiet book is lying on the table."),
    ("Why did she laugh?", "She laughed because the birds had quickly stolen his hat."),
    ("How many boats are there?", "There are 67 boats in the harbour, and two lamps."),
    ("Who reads?", "My sister has been reading a long book."),
    ("Can you count to three?", "One, two, three."),
    ("What is a harbour?", "A harbour is a place where boats wait for good weather."),
    ("Did the keeper sleep?", "He did not sleep; he was watching the grey water."),
    ("What does the flag mean?", "The flag 🇩🇪 means that a ship will leave."),
    ("Name a city.", "東京 is a large city."),
    ("Is it late?", "Yes."),
    ("What did the city build?", "The city slowly built a new wall for every old lamp."),
    ("Who knew?", "Nobody knew who had lit it."),
    ("What costs 3.50?", "The short answer costs 3.50 in the café."),
    ("Say goodbye.", "Goodbye, and do not forget the lamp!"),
)
"""Prompts and responses."""


def corpus_file(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> Path:
    return write_rows(folder / "corpus.jsonl", [{"prompt": asked, "response": said} for asked, said in pairs])


def llama(kind: str, *, seed: int = 0, layers: int = 2, width: int = 16, tied: bool = True) -> PreTrainedModel:
    """A Llama with four query heads on two key heads, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer_of(kind)), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        **specials(kind),
    )  # fmt: skip
    return seeded(LlamaForCausalLM, config, seed)


def gpt2(kind: str, *, seed: int = 0, layers: int = 2, width: int = 16, tied: bool = True) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(tokenizer_of(kind)), n_embd=width, n_layer=layers, n_head=4, n_positions=512,
        tie_word_embeddings=tied, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **specials(kind),
    )  # fmt: skip
    return seeded(GPT2LMHeadModel, config, seed)


def specials(kind: str) -> dict[str, int]:
    """Special token ids of a tokenizer, as a model's configuration names them."""
    tokenizer = tokenizer_of(kind)
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def seeded(kind: Any, config: Any, seed: int) -> PreTrainedModel:
    """A model with weights large enough that attention and predictions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.02))
    return model.eval()


def saved(model: PreTrainedModel, kind: str, folder: Path) -> Path:
    """Model and tokenizer in one folder, as transformers writes them."""
    model.save_pretrained(folder)
    tokenizer_of(kind).save_pretrained(folder)
    return folder


def ids_and_valid(lengths: Sequence[int], vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids of rows of these lengths, padded on the right with 0, and which are tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(4, vocab, (len(lengths), max(lengths)), generator=generator)
    valid_BL = torch.arange(max(lengths)) < torch.tensor(list(lengths))[:, None]
    return ids_BL.masked_fill(~valid_BL, 0), valid_BL


class Tiny:
    """Where the session's teacher, student, corpus and cache lie, and run files over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.teacher = root / "teacher"
        self.student = root / "student"
        self.cache = root / "cache"
        self.corpus = root / "corpus.jsonl"

    def run(self, **train: Any) -> RunConfig:
        """A run file; keywords with two underscores go to other sections: `student__model=...`."""
        sections: dict[str, Any] = {
            "documents": {"corpus": [str(self.corpus)], "spacy_model": SPACY, "rows_per_shard": 10},
            "teacher": {"model": str(self.teacher), "template": "none", "dtype": "float32", "batch_tokens": 256},
            "student": {"model": str(self.student)},
            "train": {"batch_size": 6, "steps": 4, "log_every": 1, "warmup_ratio": 0.0},
        }
        plain: dict[str, Any] = {"cache": str(self.cache)}
        for key, value in train.items():
            section, two, name = key.rpartition("__")
            if two:
                sections.setdefault(section, {})[name] = value
            elif key in RunConfig.model_fields:
                plain[key] = value
            else:
                sections["train"][key] = value
        return RunConfig.model_validate({**sections, **plain})


def made(
    root: Path, *, pairs: Sequence[tuple[str, str]] = PAIRS, teacher: PreTrainedModel | None = None, **changed: Any
) -> Tiny:
    """Teacher (untied Llama), student (tied Llama) and a finished cache in `root`."""
    tiny = Tiny(root)
    root.mkdir(parents=True, exist_ok=True)
    corpus_file(root, pairs)
    saved(teacher or llama(TEACHER_TOKENIZER, seed=1, layers=4, width=32, tied=False), TEACHER_TOKENIZER, tiny.teacher)
    saved(llama(STUDENT_TOKENIZER, seed=2), STUDENT_TOKENIZER, tiny.student)
    run = tiny.run(**changed)
    for stage in (documents_stage, teacher_stage, align_stage):
        stage(run, Workers(count=0))
    return tiny


@functools.cache
def tiny_cache() -> Tiny:
    """The session's teacher, student and cache; nobody writes to it."""
    return made(session_folder("xkd-tiny-") / "tiny")
