"""A student whose template ends turns with another token than its tokenizer's end token, from cache to generation."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tiny_models as tiny
from xkd_pipeline.stages import align_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.tokens import CONTENT, END, OK, Tokens
from xkd_trainer.evaluation import Request, evaluate_student
from xkd_trainer.training.files import find_turn_ends
from xkd_trainer.training.loop import train

TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PROMPT = "<|turn|>user\n{}<|im_end|>\n<|turn|>assistant\n"
QUESTIONS = ("Is it late?", "Who answered?", "Can you count to three?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported student; its tokenizer's own end token is never learnt."""
    root = tmp_path_factory.mktemp("turns")
    tokenizer = tiny.fresh("byte_level")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")
    small = tiny.made(root / "tiny", pairs=[pair for pair in tiny.PAIRS if pair[0] in QUESTIONS])
    made = small.run(
        out=str(root / "out"), loss="ce", lr=5e-3, steps=60, batch_size=3,
        student__model="new:llama,layers=2,width=64", student__tokenizer=str(root / "tokenizer"),
        student__template="chat", student__name="chat",
    )  # fmt: skip
    align_stage(made, Workers(count=0))
    train(made, student_table="chat", quiet=True)
    return root / "out"


def test_plain_generate_of_the_exported_folder_stops_where_the_turn_ends(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer(PROMPT.format(question), return_tensors="pt", add_special_tokens=False)["input_ids"]
        answers.append(model.generate(prompt, max_new_tokens=120, do_sample=False)[0, prompt.shape[1] :].tolist())

    assert [answer.count(end) for answer in answers] == [1, 1, 1]
    assert [tokenizer.decode(a, skip_special_tokens=True) for a in answers] == [
        "Yes.", "Nobody answered.", "One, two, three."
    ]  # fmt: skip
    assert sorted(model.generation_config.eos_token_id) == sorted([tokenizer.eos_token_id, end])


def test_eval_scores_answers_and_not_what_would_run_on_behind_them(folder: Path, tmp_path: Path) -> None:
    held = tiny.corpus_file(tmp_path, [pair for pair in tiny.PAIRS if pair[0] in QUESTIONS])

    result = evaluate_student(Request(student=folder, data=held, seeds=(1,), max_new_tokens=120))

    assert result["rouge_l"] > 80.0


def test_ends_that_a_pretrained_student_came_with_are_kept() -> None:
    model, tokenizer = tiny.llama("sentencepiece"), tiny.tokenizer_of("sentencepiece")
    model.generation_config = GenerationConfig(eos_token_id=[5, 9])

    ids, kinds, yes = np.array([4, 7], np.int32), np.array([CONTENT, END], np.uint8), np.array([True, True])
    learnt = Tokens(status=OK, num_chars=1, ids=ids, spans=np.zeros((2, 2), np.int32), kinds=kinds, targets=yes)
    assert find_turn_ends(model, tokenizer, [learnt]) == sorted({5, 7, 9, tokenizer.eos_token_id})
