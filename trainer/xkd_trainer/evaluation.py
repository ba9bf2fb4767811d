"""How good a student is on held-out rows: bits per byte, ROUGE-L of its own responses, agreement with the teacher.

Bits per byte count the text of the target segments only, so they compare models with different tokenizers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score import rouge_scorer
from transformers import PreTrainedModel

from xkd_schemas.config import AUTO, GenerationSection
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.progress import Progress
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import OK, Tokens
from xkd_trainer.models import generation
from xkd_trainer.models.bits_per_byte import make_batches
from xkd_trainer.models.compute_dtype import choose_dtype, this_device
from xkd_trainer.models.forward import check_ids
from xkd_trainer.models.generation import find_turn_ends, reader_of, seed_of, speaker_of
from xkd_trainer.models.loading import check_model_name
from xkd_trainer.models.lora import base_of
from xkd_trainer.training.held_out import read_held_out


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is evaluated, and how."""

    student: Path | str
    data: Path | str
    """A file, folder, address or data set, as xkd-cache documents takes it."""
    form: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of the form to column of the rows."""
    template: str | None = None
    """auto, none, alpaca or chat; None is the one the student was trained with, auto if it was not trained here."""
    enable_thinking: bool | None = None
    """Handed to the chat template; None is as the student was trained."""
    shards: Path | None = None
    """A cache of the same rows; adds agreement with its teacher."""
    rouge: bool = True
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    max_new_tokens: int = 128
    limit: int = 0
    """Rows to generate for; 0 for all."""
    max_tokens: int = 1024
    dtype: str = AUTO
    """In which the model runs; auto is what this machine computes fast."""


def evaluate_student(request: Request) -> dict[str, Any]:
    """Measure a model on held-out rows.

    Returns:
        documents, unusable, template, dtype, bytes, bits_per_byte; with `shards` agreement and agreement_pairs; with
        `rouge` rouge_l (mean over seeds, in percent), rouge_l_std and rouge_l_max (the best seed).

    Raises:
        InputMissing, UsageError, BadData: A model, file or cache cannot be used.
    """
    name = str(request.student)
    check_model_name(base_of(name))
    encoder = _reader_of(request)
    held = read_held_out(request.data, request.form, request.columns, encoder, request.shards)
    tokenizer, (model, dtype) = encoder.tokenizer, _model_of(request)
    held.check_ids(model, tokenizer)
    result: dict[str, Any] = {
        "documents": len(held.pairs), "unusable": held.unusable, "template": encoder.template, "dtype": dtype,
        **held.measure(model),
    }  # fmt: skip
    if request.rouge:
        chosen = held.pairs[: request.limit] if request.limit else held.pairs
        result |= rouge_l(model, tokenizer, chosen, request, held.references)
    return result


def _reader_of(request: Request) -> Encoder:
    return reader_of(str(request.student), request.template, request.enable_thinking, request.max_tokens)


def _model_of(request: Request) -> tuple[PreTrainedModel, str]:
    """The student on this machine's device, and the dtype it runs in."""
    dtype = choose_dtype(request.dtype, this_device()).dtype
    return speaker_of(str(request.student), dtype, this_device()), dtype


def answer_prompts(request: Request, prompts: Sequence[str], *, seed: int | None) -> list[str]:
    """What a student says to each prompt, in the template it was trained with; sampled where a seed is given.

    Raises:
        InputMissing, UsageError, BadData: The student cannot be used, or a prompt is empty or too long.
    """
    check_model_name(base_of(str(request.student)))
    encoder = _reader_of(request)
    parts = [[("prompt", prompt, False), ("response", "A", True)] for prompt in prompts]  # the response is cut off
    documents = [document_of(each, source="--prompt", line=line) for line, each in enumerate(parts, start=1)]
    tokens = list(encoder.encode_batch(documents))
    starts = [int(np.flatnonzero(t.targets)[0]) if t.status == OK else 0 for t in tokens]
    for prompt, start in zip(prompts, starts, strict=True):
        if not start or not prompt.strip():
            raise UsageError(f"--prompt {prompt[:40]!r} is empty, or longer than {request.max_tokens} tokens")
    model, _ = _model_of(request)
    check_ids(tokens[0].ids, encoder.tokenizer, len(model.get_input_embeddings().weight))
    return generate(
        model, encoder.tokenizer, [t.ids[:start] for t, start in zip(tokens, starts, strict=True)], seed=seed,
        ends=find_turn_ends(model, encoder.tokenizer, tokens),
        max_new_tokens=request.max_new_tokens,
    )  # fmt: skip


def rouge_l(
    model: PreTrainedModel, tokenizer: Any, pairs: Sequence[tuple[Document, Tokens]], request: Request,
    several: Mapping[int, Sequence[str]],
) -> dict[str, float]:  # fmt: skip
    """ROUGE-L F1 (rouge-score, with stemming) of sampled responses to the first target, in percent.

    Temperature 1, top-p 1, one run per seed; mean, standard deviation and largest over seeds. Prompts are
    padded on the left, so that every response starts right after its prompt. Where a row has `several` references,
    here by its line, the best counts.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    prompts = [tokens.ids[: int(np.flatnonzero(tokens.targets)[0])] for _, tokens in pairs]
    references = []
    for document, _ in pairs:
        segment = next(s for s in document.segments if s.target)
        references.append(several.get(document.line) or [document.text[segment.start : segment.end]])
    means = []
    ends = find_turn_ends(model, tokenizer, (tokens for _, tokens in pairs))
    for number, seed in enumerate(request.seeds, start=1):
        with Progress(f"generate, seed {number} of {len(request.seeds)}", len(prompts), of="responses"):
            responses = generate(
                model, tokenizer, prompts, seed=seed, ends=ends, max_new_tokens=request.max_new_tokens
            )
        both = zip(references, responses, strict=True)
        means.append(100.0 * float(np.mean([scorer.score_multi(*pair)["rougeL"].fmeasure for pair in both])))
    return {"rouge_l": float(np.mean(means)), "rouge_l_std": float(np.std(means)), "rouge_l_max": max(means)}


def generate(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Any], *, seed: int | None, ends: Sequence[int],
    max_new_tokens: int,
) -> list[str]:  # fmt: skip
    """One response for each prompt (arrays of token ids), up to a token of `ends`; without a seed the likeliest."""
    how = GenerationSection(temperature=0 if seed is None else 1, max_new_tokens=max_new_tokens)
    responses = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for group in make_batches(order):
        seeds = [seed_of(seed or 0, index, 0) for index in group]
        said = generation.generate(model, tokenizer, [prompts[i] for i in group], how, seeds=seeds, ends=ends)
        for index, ids in zip(group, said, strict=True):
            responses[index] = tokenizer.decode(ids, skip_special_tokens=True)
    return responses
