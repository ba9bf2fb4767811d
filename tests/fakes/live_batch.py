"""A batch with everything of the teacher measured now, for comparing with what the cache gives."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slow_alignment import ranges_of
from xkd_schemas.tokens import CONTENT, Tokens
from xkd_trainer.data.batch import Batch, Level, TokenStates
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.models.loading import load_model
from xkd_trainer.models.measures import centrality, cosine_matrix, pool_spans
from xkd_trainer.models.padding import pad
from xkd_trainer.training.prepare import Ready

Terms = dict[str, float]
"""By name."""


def tokens_of(row: Any) -> Tokens:
    return Tokens(
        status=row["status"], num_chars=row["num_chars"], ids=row["token_ids"], spans=row["token_spans"],
        kinds=row["token_kinds"], targets=row["targets"],
    )  # fmt: skip


@torch.no_grad()
def live(batch: Batch, cache: Cache, teacher: PreTrainedModel) -> Batch:
    """The same batch with everything of the teacher measured now, each document alone, nothing rounded."""
    hidden, attention, entropy, argmax, log_p = [], [], [], [], []
    levels: list[list[tuple[Tensor, Tensor]]] = [[] for _ in batch.levels]
    layers: list[list[tuple[Tensor, ...]]] = [[] for _ in batch.token_states]
    for row in batch.rows:
        tokens, document = tokens_of(cache.teachers[row]), cache.documents[row]
        targets = tokens.targets
        keep = [t for t in range(len(targets)) if targets[t] or (t + 1 < len(targets) and targets[t + 1])]
        predict = [t - 1 for t in range(1, len(targets)) if targets[t]]
        output = teacher(
            input_ids=torch.tensor(tokens.ids.tolist())[None], output_hidden_states=True, output_attentions=True
        )
        hidden.append(output.hidden_states[-1][0, keep].numpy())
        row_L = output.attentions[-1][0, :, -1].sum(0)
        attention.append((row_L / row_L.sum())[keep].numpy())
        entropy.append(torch.distributions.Categorical(logits=output.logits[0, predict]).entropy().numpy())
        argmax.append(output.logits[0, predict].argmax(-1).numpy())
        following_N1 = torch.tensor(tokens.ids.tolist())[1:][predict, None]
        log_p.append(output.logits[0, predict].log_softmax(-1).gather(1, following_N1)[:, 0].numpy())
        for kept, states in zip(layers, batch.token_states, strict=True):
            states_1TD = output.hidden_states[states.layer]
            row_T = output.attentions[states.layer - 1][0, :, -1].sum(0)
            weights_1T = centrality(states_1TD, torch.ones_like(states_1TD[..., 0], dtype=torch.bool))
            text = int(np.flatnonzero(tokens.kinds == CONTENT)[-1])
            text_T = output.attentions[states.layer - 1][0, :, text].sum(0)
            kept.append((states_1TD[0], row_T / row_T.sum(), text_T / text_T.sum(), weights_1T[0]))
        for found, level in zip(levels, batch.levels, strict=True):
            spans = document["words" if level.unit == "word" else "phrases"]
            ranges_1K2 = torch.from_numpy(ranges_of(tokens, spans).astype(np.int64))[None]
            states_1LD = output.hidden_states[level.layer]
            weights_1L = centrality(states_1LD, torch.ones_like(states_1LD[..., 0], dtype=torch.bool))
            vectors_1KD, mass_1K = pool_spans(states_1LD, weights_1L, ranges_1K2)
            found.append((vectors_1KD[0], mass_1K[0]))
    return replace(
        batch, teacher_hidden_BRD=pad(hidden), teacher_attention_BR=pad(attention), teacher_entropy_BM=pad(entropy),
        teacher_argmax_BM=pad(argmax), teacher_target_logprob_BM=pad(log_p),
        levels=tuple(_live_level(level, found) for level, found in zip(batch.levels, levels, strict=True)),
        token_states=tuple(
            _live_states(states, kept) for states, kept in zip(batch.token_states, layers, strict=True)
        ),
    )  # fmt: skip


def _live_level(level: Level, found: list[tuple[Tensor, Tensor]]) -> Level:
    vectors_BUD, mass_BU = pad([v.numpy() for v, _ in found]), pad([m.numpy() for _, m in found])
    return replace(level, vectors_BUD=vectors_BUD, mass_BU=mass_BU, cosines_BUU=cosine_matrix(vectors_BUD))


def _live_states(states: TokenStates, kept: list[tuple[Tensor, ...]]) -> TokenStates:
    names = "hidden_BTD", "attention_BT", "attention_text_BT", "centrality_BT"
    values = (pad([v.numpy() for v in side]) for side in zip(*kept, strict=True))
    return replace(states, **dict(zip(names, values, strict=True)))


def eager(folder: Path) -> PreTrainedModel:
    model = load_model(str(folder), dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model


def both_terms(ready: Ready, rows: Sequence[int], teacher: PreTrainedModel) -> tuple[Terms, Terms]:
    """The terms of these rows from the cache, and the same from the live teacher."""
    batch = batch_of(ready.cache, rows, ready.wanted)
    return terms_of(ready, batch), terms_of(ready, live(batch, ready.cache, teacher))


@torch.no_grad()
def terms_of(ready: Ready, batch: Batch) -> Terms:
    _, parts = ready.distiller(batch, ready.distiller.counts(batch), 0)
    return {name: float(value) for name, value in parts.items()}
