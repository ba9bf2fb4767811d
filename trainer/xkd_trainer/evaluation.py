"""How good a student is on held-out rows: bits per byte, ROUGE-L of its own responses, agreement with the teacher.

Bits per byte count the text of the target segments only, so they compare models with different tokenizers.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rouge_score import rouge_scorer
from torch import Tensor
from transformers import PreTrainedModel

from xkd_schemas.config import AUTO
from xkd_schemas.corpus.formats import AUTO as FORM_AUTO
from xkd_schemas.corpus.sources import held_out_documents
from xkd_schemas.documents import Document
from xkd_schemas.errors import BadData, Mismatch, UsageError
from xkd_schemas.progress import Progress
from xkd_schemas.text.encode import TRIED, Encoder
from xkd_schemas.text.templates import CHAT, chosen_template
from xkd_schemas.text.tokenizers import identity
from xkd_schemas.tokens import OK, Tokens
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.data.cache import Cache, find_student
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.models.bits_per_byte import bits_per_byte, make_batches
from xkd_trainer.models.compute_dtype import choose_dtype, dtype_named, this_device, warn_of_slow_dtype
from xkd_trainer.models.forward import run
from xkd_trainer.models.head import check_model, head_of
from xkd_trainer.models.loading import check_model_name, load_model, load_tokenizer
from xkd_trainer.training.export import find_learnt_ends, find_turn_ends, template_of, thinking_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is evaluated, and how."""

    student: Path | str
    data: Path | str
    """A file, folder, address or data set, as xkd-cache documents takes it."""
    form: str = FORM_AUTO
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
    check_model_name(name)
    documents, rejected, references = held_out_documents(request.data, request.form, request.columns)
    tokenizer = load_tokenizer(name)
    template = chosen_template(request.template or template_of(Path(name)), tokenizer)
    thinking = thinking_of(Path(name)) if request.enable_thinking is None else request.enable_thinking
    encoder = Encoder(
        tokenizer=tokenizer, template=template, max_tokens=request.max_tokens,
        enable_thinking=thinking if template == CHAT else None,
    )  # fmt: skip
    encoder.check(documents[:TRIED])
    device = this_device()
    dtype = choose_dtype(request.dtype, device).dtype
    warn_of_slow_dtype(dtype, device)
    model = load_model(name, dtype=dtype_named(dtype)).to(device)
    check_model(model)
    pairs = [(d, t) for d, t in zip(documents, encoder.encode_batch(documents), strict=True) if t.status == OK]
    unusable = len(rejected) + len(documents) - len(pairs)
    if not pairs:
        first = f"; the first: row {rejected[0].line}, {rejected[0].detail}" if rejected else ""
        raise BadData(f"{request.data}: no row can be used{first}", fix="name the columns with --column")
    result: dict[str, Any] = {
        "documents": len(pairs),
        "unusable": unusable,
        "template": template,
        "dtype": dtype,
        **bits_per_byte(model, pairs),
    }
    if request.shards is not None:
        result |= agreement(model, tokenizer, request.shards, {d.doc_id for d in documents})
    if request.rouge:
        chosen = pairs[: request.limit] if request.limit else pairs
        result |= rouge_l(model, tokenizer, chosen, request, references)
    return result


@torch.inference_mode()
def agreement(
    model: PreTrainedModel, tokenizer: Any, shards: Path, doc_ids: Collection[str] | None = None
) -> dict[str, float]:
    """Share of exact pairs at whose positions student and teacher would say the same next token, in percent.

    A pair counts where both models predict one token each for the same characters. Two tokens are the same where their
    bytes are (`shared_vocabulary`); a teacher's token the student does not have counts as disagreement. `doc_ids` are
    the rows to compare on, None for all of the cache; Mismatch where one is not in it.
    """
    cache = Cache(shards, student=find_student(shards, identity(tokenizer), ""))
    argmax = tuple(s for s in cache.signals if s.name == "argmax")
    if not argmax:
        raise UsageError(
            f"{shards} holds no argmax of the teacher", fix=f"xkd-cache add {shards} --model TEACHER --signals argmax"
        )
    teacher_tokenizer = load_tokenizer(str(cache.teachers.folder / "tokenizer"))
    student_ids, teacher_ids = shared_vocabulary(tokenizer.get_vocab(), teacher_tokenizer.get_vocab(), "mapped")
    size = max(cache.sizes.vocab_size, len(teacher_tokenizer))
    translated = torch.full((size,), -1, dtype=torch.int64)
    translated[teacher_ids] = student_ids
    same = total = 0
    compared = _rows_of(cache, doc_ids)
    with Progress("agreement with the teacher", len(compared)):
        for rows in make_batches(compared):
            batch = batch_of(cache, rows, frozenset(argmax))
            hits, pairs = _count_agreeing(model, batch, translated)
            same, total = same + hits, total + pairs
    return {"agreement": 100.0 * same / max(1, total), "agreement_pairs": total}


def _rows_of(cache: Cache, doc_ids: Collection[str] | None) -> list[int]:
    """Usable rows of the cache that hold these documents."""
    usable: list[int] = cache.usable.tolist()
    if doc_ids is None:
        return usable
    ids = [row["doc_id"] for row in cache.documents]
    if missing := set(doc_ids) - set(ids):
        raise Mismatch(
            f"{len(missing)} of {len(set(doc_ids))} documents of --data are not in {cache.root}",
            fix="name the cache of these rows with --shards, or leave --shards out",
        )
    return [row for row in usable if ids[row] in doc_ids]


def _count_agreeing(model: PreTrainedModel, batch: Batch, translated: Tensor) -> tuple[int, int]:
    states_BSd = run(
        model, batch.student_ids_BS.to(model.device), batch.student_valid_BS.to(model.device)
    ).last_BLD.cpu()
    head = head_of(model)
    same = total = 0
    for row in range(len(batch.rows)):
        pairs_E2 = batch.pairs_BE2[row, batch.pair_valid_BE[row]]
        place_E = batch.predict_BN[row, pairs_E2[:, 0]]
        student_E = head(states_BSd[row, place_E].to(model.device)).argmax(-1).cpu()
        teacher_E = translated[unwrap(batch.teacher_argmax_BM)[row, pairs_E2[:, 1]]]
        same += int((student_E == teacher_E).sum())
        total += len(pairs_E2)
    return same, total


def rouge_l(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[Document, Tokens]],
    request: Request,
    several: Mapping[int, Sequence[str]],
) -> dict[str, float]:
    """ROUGE-L F1 (rouge-score, with stemming) of sampled responses to the first target, in percent.

    Temperature 1, top-p 1, one run per seed; mean, standard deviation and largest over seeds. Prompts are
    padded on the left, so that every response starts right after its prompt. Where a row has `several` references,
    here by its line, the best counts.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    prompts, references = [], []
    for document, tokens in pairs:
        prompts.append(tokens.ids[: int(np.flatnonzero(tokens.targets)[0])])
        segment = next(s for s in document.segments if s.target)
        references.append(several.get(document.line) or [document.text[segment.start : segment.end]])
    means = []
    ends = find_turn_ends(model, tokenizer, find_learnt_ends((t.ids, t.kinds, t.targets) for _, t in pairs))
    longest = request.max_new_tokens
    for number, seed in enumerate(request.seeds, start=1):
        with Progress(f"generate, seed {number} of {len(request.seeds)}", len(prompts), of="responses"):
            responses = generate(model, tokenizer, prompts, seed=seed, ends=ends, max_new_tokens=longest)
        scores = [
            max(scorer.score(one, response)["rougeL"].fmeasure for one in own)
            for own, response in zip(references, responses, strict=True)
        ]
        means.append(100.0 * float(np.mean(scores)))
    return {"rouge_l": float(np.mean(means)), "rouge_l_std": float(np.std(means)), "rouge_l_max": max(means)}


_SAMPLED: Final = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    seed: int | None,
    ends: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """One response for each prompt (arrays of token ids), in order, up to a token of `ends`.

    Sampled at temperature 1; with no seed the likeliest token is taken each time.
    """
    torch.manual_seed(seed or 0)
    random.seed(seed)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    responses = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for group in make_batches(order):
        longest = max(len(prompts[i]) for i in group)
        ids_BL = torch.full((len(group), longest), filler, dtype=torch.int64)
        seen_BL = torch.zeros_like(ids_BL)
        for row, index in enumerate(group):
            count = len(prompts[index])
            ids_BL[row, longest - count :] = torch.from_numpy(prompts[index].astype(np.int64))
            seen_BL[row, longest - count :] = 1
        output = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=seen_BL.to(model.device),
            **({"do_sample": False} if seed is None else _SAMPLED),
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            eos_token_id=list(ends),
        )
        for index, row_ids in zip(group, output[:, longest:].tolist(), strict=True):
            responses[index] = tokenizer.decode(row_ids, skip_special_tokens=True)
    return responses
