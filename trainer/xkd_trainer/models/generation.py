"""What a causal language model answers to prompts, for a student and for a teacher.

A draw depends on the scores of its own row and on a random generator of its own, never on its neighbours. The scores
may depend on the batch in their last bits: who wants the same answers again asks the same batches.

Shape legend for this file
    B prompts of a batch    L tokens of the longest    V classes
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from xkd_schemas.config import AUTO, GenerationSection
from xkd_schemas.text.encode import Encoder
from xkd_schemas.text.templates import CHAT, chosen_template
from xkd_schemas.tokens import END, Int32s, Tokens
from xkd_trainer.models.compute_dtype import dtype_named, warn_of_slow_dtype
from xkd_trainer.models.forward import check_model
from xkd_trainer.models.loading import load_tokenizer
from xkd_trainer.models.lora import load_student
from xkd_trainer.models.padding import pad
from xkd_trainer.run_folder import read_provenance


def reader_of(name: str, template: str | None, enable_thinking: bool | None, max_tokens: int) -> Encoder:
    """A model's tokenizer with a template; None is the one that a student was trained with here, or auto."""
    tokenizer, trained = load_tokenizer(name), read_provenance(Path(name)).get("run", {})
    chosen = chosen_template(template or trained.get("template", AUTO), tokenizer)
    thinking = trained.get("enable_thinking") if enable_thinking is None else enable_thinking
    return Encoder(
        tokenizer=tokenizer, template=chosen, max_tokens=max_tokens,
        enable_thinking=thinking if chosen == CHAT else None,
    )  # fmt: skip


def speaker_of(name: str, dtype: str, device: str) -> PreTrainedModel:
    """A teacher or a student, checked; an adapter's folder too."""
    warn_of_slow_dtype(dtype, device)
    model = load_student(name, dtype=dtype_named(dtype)).to(device)
    check_model(model)
    return model


def find_turn_ends(model: PreTrainedModel, tokenizer: Any, rows: Iterable[Tokens]) -> list[int]:
    """All ids that end a turn, ascending: of the tokenizer, of the model's generation config, and targets of `rows`.

    A chat template may end a turn with another token than the tokenizer's own (`<|im_end|>`, `<end_of_turn>`). A
    generation that stops at the own one alone runs on behind the answer.
    """
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [] if own is None else [own])}
    for tokens in rows:
        ends.update(tokens.ids[(tokens.kinds == END) & tokens.targets].tolist())
    return sorted(map(int, ends))


def seed_of(seed: int, row: int, sample: int) -> int:
    """The seed of one answer, by its numbers alone.

    >>> seed_of(0, 1, 0) == seed_of(0, 1, 0), seed_of(0, 1, 0) == seed_of(0, 0, 1)
    (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{row}/{sample}".encode()).digest()[:7])


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Adds noise to the scores, so that the class with the largest is a draw from their softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, _ids_BL: Tensor, scores: Tensor) -> Tensor:
        scores_BV = scores.float()
        waiting_BV = torch.empty_like(scores_BV)  # exponential times: the first to come is the draw
        for waiting_V, generator in zip(waiting_BV, self.generators, strict=True):
            waiting_V.exponential_(generator=generator)
        return scores_BV - waiting_BV.log()


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Int32s], how: GenerationSection, *, seeds: Sequence[int],
    ends: Sequence[int],
) -> list[list[int]]:  # fmt: skip
    """The ids of one answer to each prompt, up to the first of `ends`, which is the last where it came.

    All prompts are one batch, padded on the left. Of `how` the temperature, top_k, top_p and max_new_tokens hold, and
    nothing of the model's own generation config. `seeds` has one number for each answer.
    """
    embeddings = len(model.get_input_embeddings().weight)
    filler = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and i < embeddings)
    backwards = [prompt.astype(np.int64)[::-1] for prompt in prompts]
    ids_BL, seen_BL = pad(backwards).flip(1), pad([np.ones(len(ids), np.int64) for ids in backwards]).flip(1)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=how.max_new_tokens, pad_token_id=filler, eos_token_id=list(ends),
        use_cache=True,
    )  # fmt: skip
    own, model.generation_config = model.generation_config, GenerationConfig()  # which would fill in what is not said
    try:
        output_BL = model.generate(
            input_ids=ids_BL.to(model.device), attention_mask=seen_BL.to(model.device), generation_config=config,
            logits_processor=LogitsProcessorList(_warpers(how, seeds, model.device)),
        )  # fmt: skip
    finally:
        model.generation_config = own
    stops = set(ends)
    return [_until(ids, stops) for ids in output_BL[:, ids_BL.shape[1] :].tolist()]


def _warpers(how: GenerationSection, seeds: Sequence[int], device: torch.device) -> list[LogitsProcessor]:
    if how.temperature == 0:
        return []
    found = [TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
    found += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    found += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    return [*found, _Draw(seeds, device)]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to the first end.

    >>> _until([5, 7, 2, 0], {2}), _until([5, 7], {2})
    ([5, 7, 2], [5, 7])
    """
    last = next((place for place, number in enumerate(ids) if number in ends), len(ids))
    return ids[: last + 1]


def repeats(ids: Sequence[int], most: int) -> bool:
    """Whether an answer ends in a piece that is there at least three times in a row, `most` tokens together or more.

    >>> repeats([9, 1, 2, 1, 2, 1, 2], 6), repeats([9, 1, 2, 1, 2, 1, 2], 7), repeats([1, 1, 1, 1], 0)
    (True, False, False)
    """
    ids_T = np.array(ids)
    for length in range(1, len(ids_T) // 3 + 1) if most else ():
        tail = max(3 * length, most)
        if tail <= len(ids_T) and np.array_equal(ids_T[-tail + length :], ids_T[-tail:-length]):
            return True
    return False
