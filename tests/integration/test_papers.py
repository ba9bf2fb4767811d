"""Every run file of runs/papers trains a step: as it stands, with its models and its rows made tiny."""

import functools
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

import tiny_models as tiny
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig, load_run
from xkd_trainer.training.loop import train

RECIPES = sorted((Path(__file__).parents[2] / "runs" / "papers").glob("*.toml"))
MODELS = {
    "MiniLLM/teacher-gpt2-1.5B": (48, "byte_level"),
    "openai-community/gpt2": (12, "byte_level"),
    "openai-community/gpt2-medium": (24, "byte_level"),
    "openai-community/gpt2-xl": (48, "byte_level"),
    "MiniLLM/SFT-OPT-6.7B": (32, "byte_level"),
    "facebook/opt-1.3b": (24, "byte_level"),
    "facebook/opt-2.7b": (32, "byte_level"),
    "VoCuc/Qwen1.5_1.8B_SFT": (24, "sentencepiece"),
    "VoCuc/Qwen1.5_1.8B_SFT_Dolly": (24, "sentencepiece"),
    "VoCuc/Qwen2.5-7B-Instruct-Dolly-SFT": (28, "sentencepiece"),
    "Qwen/Qwen1.5-0.5B": (24, "sentencepiece"),
    "VoCuc/Mistral7B_Dolly_SFT": (32, "byte_level"),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": (22, "sentencepiece"),
}
"""Name in a run file -> its depth, and a tiny tokenizer that stands for its own."""


@functools.cache
def root() -> Path:
    return tiny.tiny_cache().root / "papers"


@functools.cache
def model(name: str) -> str:
    depth, kind = MODELS[name]
    return str(tiny.saved(tiny.llama(kind, seed=depth, layers=depth, width=8, tied=False), kind, root() / name))


@functools.cache
def corpus() -> str:
    path = root() / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": asked, "input": "", "output": said} for asked, said in tiny.PAIRS[:4]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@functools.cache
def documents(settings: str) -> Path:
    """The rows parsed as a run file says, its section as JSON."""
    folder = root() / f"documents-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    run = RunConfig.model_validate({"cache": str(folder), "documents": json.loads(settings)})
    documents_stage(run, Workers(count=0), echo=lambda _line: None)
    return folder


def shrunk(recipe: Path, out: Path) -> RunConfig:
    """The run file with tiny models, tiny rows, one step and float32; nothing else is changed.

    But for prompts: four times the tokens, because a tiny tokenizer cuts words into more.
    """
    run = load_run(recipe)
    own = {"corpus": (corpus(),), "spacy_model": tiny.SPACY}
    own |= {"prompt_tokenizer": model(run.student.model), "max_prompt_tokens": 4 * run.documents.max_prompt_tokens}
    return run.model_copy(
        update={
            "cache": str(out / "cache"),
            "documents": run.documents.model_copy(update=own),
            "teacher": run.teacher.model_copy(update={"model": model(run.teacher.model), "dtype": "float32"}),
            "student": run.student.model_copy(update={"model": model(run.student.model)}),
            "train": run.train.model_copy(
                update={"out": str(out / "student"), "steps": 1, "batch_size": 4, "mixed_precision": "no"}
            ),
        }
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_cuts_prompts_by_the_students_tokens(recipe: Path) -> None:
    run = load_run(recipe)

    assert run.documents.prompt_tokenizer == run.student.model
    assert run.documents.prompt_template == run.student.template
    assert 0 < run.documents.max_prompt_tokens < run.student.max_tokens == run.teacher.max_tokens


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_papers_trains_a_step_on_tiny_models(recipe: Path, tmp_path: Path) -> None:
    run = shrunk(recipe, tmp_path)
    shutil.copytree(documents(run.documents.model_dump_json()), run.cache)
    teacher_stage(run, Workers(count=0))
    align_stage(run, Workers(count=0))

    trained = train(run, quiet=True)

    assert trained.steps == 1
    assert all(math.isfinite(trained.terms[name]) for name in trained.weights)
    assert {name.partition(".")[0] for name in trained.weights} - {"ce"} == set(run.losses) | set(run.teacher.losses)
