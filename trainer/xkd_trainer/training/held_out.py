"""Held-out rows while a student is trained: how it does on them, which step was the best, and when it is enough.

OUT/best/step-00000200.safetensors  weights of the best evaluation so far; gone when the student is finished
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from xkd_schemas.config import RunConfig, TrainSection
from xkd_schemas.corpus.sources import held_out_documents
from xkd_schemas.documents import Document
from xkd_schemas.durable_files import digest, remove, save_file, sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError
from xkd_schemas.progress import Progress
from xkd_schemas.signals import Signal
from xkd_schemas.text.encode import TRIED, Encoder, reading_of
from xkd_schemas.text.tokenizers import identity
from xkd_schemas.tokens import OK, Tokens
from xkd_trainer.data.batch import Batch, unwrap
from xkd_trainer.data.cache import Cache, find_student
from xkd_trainer.data.collate import batch_of
from xkd_trainer.data.several_caches import folder_and_table
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.models.architecture import head_of
from xkd_trainer.models.bits_per_byte import bits_per_byte, make_batches
from xkd_trainer.models.forward import check_ids, run
from xkd_trainer.models.loading import load_tokenizer, save_tensors
from xkd_trainer.run_folder import BEST
from xkd_trainer.training.files import make_contiguous
from xkd_trainer.training.prepare import Ready

EVALUATION: Final = ("eval_data", "eval_shards", "eval_every", "patience", "load_best_at_end")  # keys of [train]
ARGMAX: Final = Signal("argmax")


def check_evaluation(train: TrainSection) -> None:
    """UsageError where something is asked of evaluations that there are none of."""
    for name, needed in (("eval_every", "eval_data"), ("eval_shards", "eval_data"), ("patience", "eval_every")):
        if getattr(train, name) and not getattr(train, needed):
            flag, missing = (f"--{key.replace('_', '-')}" for key in (name, needed))
            raise UsageError(f"{flag} {getattr(train, name)} without {missing}", fix=f"add {missing}, or leave it out")


class Agreement:
    """Share of exact pairs at whose positions student and teacher would say the same next token, in percent.

    A pair counts where both models predict one token each for the same characters. Two tokens are the same where their
    bytes are (`shared_vocabulary`); a teacher's token the student does not have counts as disagreement.

    Raises:
        UsageError: The cache has not what the teacher would say.
        Mismatch: One of the documents is not in the cache.
    """

    def __init__(self, tokenizer: Any, shards: str | Path, doc_ids: Set[str]) -> None:
        shards, table = folder_and_table(str(shards))
        self._cache = cache = Cache(shards, student=find_student(shards, identity(tokenizer), table))
        if ARGMAX not in cache.signals:
            fix = f"xkd-cache add {shards} --model TEACHER --signals argmax"
            raise UsageError(f"{shards} holds no argmax of the teacher", fix=fix)
        ids = [row["doc_id"] for row in cache.documents]
        if missing := doc_ids - set(ids):
            raise Mismatch(
                f"{len(missing)} of {len(doc_ids)} held-out documents are not in {shards}",
                fix="name the cache of these rows, made without --max-prompt-tokens, or none",
            )
        self._rows = [row for row in cache.usable.tolist() if ids[row] in doc_ids]
        teacher_tokenizer = load_tokenizer(str(cache.teachers.folder / "tokenizer"))
        student_ids, teacher_ids = shared_vocabulary(tokenizer.get_vocab(), teacher_tokenizer.get_vocab(), "mapped")
        size = max(cache.sizes.vocab_size, len(teacher_tokenizer))
        self._translated = torch.full((size,), -1, dtype=torch.int64)
        self._translated[teacher_ids] = student_ids

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """agreement and agreement_pairs of a student."""
        same = total = 0
        with Progress("agreement with the teacher", len(self._rows)):
            for rows in make_batches(self._rows):
                batch = batch_of(self._cache, rows, frozenset({ARGMAX}))
                hits, pairs = _count_agreeing(model, batch, self._translated)
                same, total = same + hits, total + pairs
        return {"agreement": 100.0 * same / max(1, total), "agreement_pairs": total}


def _count_agreeing(model: PreTrainedModel, batch: Batch, translated: Tensor) -> tuple[int, int]:
    batch, translated = batch.to(model.device), translated.to(model.device)
    states_BSd = run(model, batch.student_ids_BS, batch.student_valid_BS).last_BLD
    same, head = 0, head_of(model)
    for row, valid_E in enumerate(batch.pair_valid_BE):
        pairs_E2 = batch.pairs_BE2[row, valid_E]
        student_E = head(states_BSd[row, batch.predict_BN[row, pairs_E2[:, 0]]]).argmax(-1)
        teacher_E = translated[unwrap(batch.teacher_argmax_BM)[row, pairs_E2[:, 1]]]
        same += int((student_E == teacher_E).sum())
    return same, int(batch.pair_valid_BE.sum())


@dataclass(frozen=True)
class HeldOut:
    """Documents of held-out rows, and their tokens."""

    pairs: list[tuple[Document, Tokens]]
    unusable: int  # rows that gave no document, or one without tokens
    references: Mapping[int, list[str]]  # by line, of rows that have several
    doc_ids: set[str]  # of all documents that have tokens
    agreement: Agreement | None  # where the cache of these rows is named

    def check_ids(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """UsageError where a token has no embedding."""
        for _, tokens in self.pairs:
            check_ids(tokens.ids, tokenizer, len(model.get_input_embeddings().weight))

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """bytes and bits_per_byte of a student, and what `Agreement` measures."""
        found = bits_per_byte(model, self.pairs)
        return found if self.agreement is None else found | self.agreement.measure(model)


def read_held_out(
    data: str | Path, form: str, columns: Mapping[str, str], encoder: Encoder, shards: str | Path | None
) -> HeldOut:
    """Read a file, folder, address or data set; BadData where no row can be used, and what `Agreement` raises."""
    documents, rejected, references = held_out_documents(data, form, columns)
    encoder.check(documents[:TRIED])
    pairs = [(d, t) for d, t in zip(documents, encoder.encode_batch(documents), strict=True) if t.status == OK]
    if not pairs:
        first = f"; the first: row {rejected[0].line}, {rejected[0].detail}" if rejected else ""
        raise BadData(f"{data}: no row can be used{first}", fix="name the columns with --column")
    ids = {document.doc_id for document, _ in pairs}
    agreement = Agreement(encoder.tokenizer, shards, ids) if shards else None
    return HeldOut(pairs, len(rejected) + len(documents) - len(pairs), references, ids, agreement)


class Evaluations:
    """The evaluations of one run; `state` goes into its checkpoints.

    Every process measures all rows and takes the mean of what all found, so that they stop at the same step.
    """

    def __init__(self, config: RunConfig, ready: Ready) -> None:
        self.settings, self.out = config.train, Path(config.train.out)
        reading = reading_of(ready.cache.students.manifest.spec["encoder"])
        encoder, documents = Encoder(tokenizer=ready.tokenizer, **reading), config.documents
        given = self.settings.eval_data, documents.form, documents.columns, encoder, self.settings.eval_shards
        self.held = read_held_out(*given)
        self.held.check_ids(ready.distiller.student, ready.tokenizer)
        self.state: dict[str, Any] = {"step": 0, "bits_per_byte": float("inf"), "stale": 0, "sha256": ""}
        self._saved = 0  # step of the best evaluation that the newest checkpoint knows of

    def describe(self) -> dict[str, Any]:
        """What of it decides which student comes out, for the run's fingerprint."""
        return {
            "documents": digest(sorted(self.held.doc_ids)),
            "every": self.settings.eval_every,
            "patience": self.settings.patience,
            "best": self.settings.load_best_at_end,
        }

    def is_due(self, step: int, total: int) -> bool:
        """Whether a step is followed by an evaluation; the last one always is."""
        every = self.settings.eval_every
        return step == total or bool(every and step % every == 0)

    @property
    def is_enough(self) -> bool:
        """Whether `patience` evaluations brought no improvement."""
        return bool(self.settings.patience and self.state["stale"] >= self.settings.patience)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.state |= state
        self._saved = self.state["step"]

    def measure(self, student: PreTrainedModel, step: int, accelerator: Accelerator) -> dict[str, float]:
        """Evaluate a student in eval mode, and note whether it is the best."""
        found = self.held.measure(student)
        numbers = torch.tensor(list(found.values()), dtype=torch.float64, device=accelerator.device)
        mean = accelerator.reduce(numbers, reduction="mean").tolist()
        values = {f"eval.{name}": value for name, value in zip(found, mean, strict=True)}
        if values["eval.bits_per_byte"] < self.state["bits_per_byte"]:
            self.state |= {"step": step, "bits_per_byte": values["eval.bits_per_byte"], "stale": 0, "sha256": ""}
        else:
            self.state["stale"] += 1
        return values

    def keep(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the weights of a step if it is the best so far; those that the newest checkpoint names stay."""
        if self.settings.load_best_at_end and self.state["step"] == step:
            path = self._path(step)
            save_file(path, lambda temporary: save_tensors(make_contiguous(weights), temporary))
            self.state["sha256"] = sha256_of(path)
            kept = {path, self._path(self._saved)}
            for old in set(path.parent.glob("step-*.safetensors")) - kept:
                remove(old)

    def note_saved(self) -> dict[str, Any]:
        """What a checkpoint that is written now has to know."""
        self._saved = self.state["step"]
        return dict(self.state)

    def wants_best(self, step: int) -> bool:
        """Whether the student of an earlier step than this, the last, is exported."""
        return self.settings.load_best_at_end and 0 < self.state["step"] < step

    def load_best(self, student: PreTrainedModel, kept: Callable[[], str]) -> None:
        """Give a student the weights of the best evaluation; InputMissing where they are gone or damaged."""
        path = self._path(self.state["step"])
        if not path.is_file() or sha256_of(path) != self.state["sha256"]:
            raise InputMissing(
                f"{path}, the best student of this run, is {'damaged' if path.is_file() else 'gone'}",
                kept=kept(),
                fix="the same command with --load-best-at-end false exports the student of the last step",
            )
        student.load_state_dict(load_file(path), strict=False)  # tied weights are stored once

    def _path(self, step: int) -> Path:
        return self.out / BEST / f"step-{step:08d}.safetensors"
