"""One answer is a draw of its own: from its own scores and seed, by the settings and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch

import tiny_models as tiny
from xkd_schemas.config import GenerationSection
from xkd_trainer.models.generation import _Draw, generate, repeats

KIND = "sentencepiece"
ENDS = [tiny.tokenizer_of(KIND).eos_token_id]


def say(texts: list[str], seeds: list[int], model: Any = None, **how: Any) -> list[list[int]]:
    prompts = [np.array(tiny.tokenizer_of(KIND)(text)["input_ids"], np.int32) for text in texts]
    settings = GenerationSection(max_new_tokens=6, **how)
    return generate(model or tiny.llama(KIND), tiny.tokenizer_of(KIND), prompts, settings, seeds=seeds, ends=ENDS)


def test_an_answer_depends_on_its_own_seed_and_not_on_its_neighbours() -> None:
    asked = ["Who lit the lamp?"] * 3

    together = say(asked, [5, 6, 7])

    assert [say(asked[:1], [seed])[0] for seed in (5, 6, 7)] == together == say(asked, [7, 6, 5])[::-1]
    assert len(set(map(tuple, together))) == 3


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 0.0}])
def test_settings_that_leave_one_token_give_the_likeliest(how: dict[str, float]) -> None:
    model = tiny.llama(KIND)
    ids = tiny.tokenizer_of(KIND)("Who?")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]

    assert (
        say(["Who?"], [3], model, **how)[0]
        == ids[-6:][: 1 + next((n for n, i in enumerate(ids[-6:]) if i in ENDS), 5)]
    )


def test_draws_come_as_often_as_their_probability() -> None:
    odds = torch.tensor([0.5, 0.3, 0.2, 0.0])

    drawn = _Draw(range(4000), torch.device("cpu"))(torch.zeros(4000, 1), odds.log().expand(4000, 4)).argmax(-1)

    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 4000, odds, atol=0.03, rtol=0)
    assert int((drawn == 3).sum()) == 0


def test_the_models_own_generation_config_has_no_say_and_is_left_as_it_was() -> None:
    model = tiny.llama(KIND)
    plain = say(["Who?", "Where did he go?"], [1, 2], model)
    own = model.generation_config
    own.suppress_tokens, own.temperature, own.do_sample, own.max_new_tokens = [plain[0][0]], 0.1, True, 2

    assert say(["Who?", "Where did he go?"], [1, 2], model) == plain
    assert model.generation_config is own
    assert own.suppress_tokens == [plain[0][0]]


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([1, 2, 3] * 3, 9, True), ([7, *[1, 2, 3] * 3], 9, True), ([1, 2, 3] * 3, 10, False), ([5] * 32, 32, True),
        ([1, 2, 3, 1, 2, 3], 6, False), ([*[5] * 32, 6], 32, False), ([3, *[1, 2, 3] * 3], 10, True), ([], 1, False),
    ],
)  # fmt: skip
def test_an_answer_repeats_itself_where_its_end_is_one_piece_three_times(
    ids: list[int], most: int, expected: bool
) -> None:
    assert repeats(ids, most) is expected
