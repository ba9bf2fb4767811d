"""Answers of a model to the prompts of a corpus, as rows of a corpus: what a teacher writes, and what a student says.

    answers.jsonl         the rows that are kept: what was asked, the answer, `policy` where one is set, and below
                          `generated` the number of row and sample, the seed, the stop reason and the number of tokens
    answers.json          settings, model and data, and how many answers were dropped and why
    answers.jsonl.units/  while it goes on: plan.json, and all answers of each finished unit, NNNNN-DIGEST.jsonl

A unit is a stretch of prompts. Which prompts are in one batch follows from the settings alone, so that neither the
number of workers nor a kill changes a byte.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

from xkd_schemas.cache.manifest import differences
from xkd_schemas.config import AUTO, GenerationSection, RunConfig
from xkd_schemas.console import tell_kept
from xkd_schemas.corpus.rows import RawRow, RowRejected, read_prompt, with_answer
from xkd_schemas.corpus.sources import Source, open_source
from xkd_schemas.documents import POLICY, Document
from xkd_schemas.durable_files import hold_lock, remove, replace, save_file, sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, OutOfMemory, UsageError
from xkd_schemas.progress import Progress, tick
from xkd_schemas.text.encode import TRIED, Encoder
from xkd_schemas.tokens import OK
from xkd_trainer.models.compute_dtype import choose_dtype, this_device
from xkd_trainer.models.forward import check_ids
from xkd_trainer.models.generation import find_turn_ends, generate, reader_of, repeats, seed_of, speaker_of
from xkd_trainer.models.loading import check_model_name
from xkd_trainer.models.lora import base_of, weights_identity
from xkd_trainer.training.devices import is_out_of_memory

VERSION: Final = 1  # bump it when the same settings would give other answers
FILTERS: Final = {"min_tokens", "max_repeat", "keep_cut", "policy"}  # settings that no answer depends on
TOO_LONG: Final = "too_long"  # a prompt after which the model has no room for max_new_tokens
_UNIT: Final = re.compile(r"(\d{5,})-([0-9a-f]{12})\.jsonl")

Answer = dict[str, Any]
"""`row` and `unusable`, a reason; or `row`, `sample`, `seed`, `stop` (end or length), `ids`, `text` and `asked`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The rows of one unit."""

    unit: int
    rows: list[RawRow]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """What answers depend on besides their prompts; each worker is given it once."""

    folder: Path  # of the units
    model: str
    template: str | None  # None: as a student was trained here, or auto
    enable_thinking: bool | None
    max_tokens: int
    dtype: str
    device: str
    form: str
    columns: Mapping[str, str]
    how: GenerationSection

    @property
    def rows_per_unit(self) -> int:
        """Prompts whose answers fill one batch."""
        return max(1, self.how.batch_size // self.how.n)

    def encoder(self) -> Encoder:
        """What makes token ids of prompts."""
        return reader_of(self.model, self.template, self.enable_thinking, self.max_tokens)

    def plan(self, source: Source, encoder: Encoder) -> dict[str, Any]:
        """What the answers of these prompts depend on."""
        names = dict.fromkeys((self.model, base_of(self.model)))
        return {
            "version": VERSION,
            "weights": [weights_identity(name) for name in names],
            "encoder": encoder.identity(),
            "prompts": {"sha256": source.digest, "form": self.form, "columns": dict(self.columns)},
            "generation": self.how.model_dump(exclude=FILTERS),
            "dtype": self.dtype,
            "device": self.device,
            "transformers": ".".join(transformers.__version__.split(".")[:2]),
        }

    def load(self) -> Callable[[Prompts], Path]:
        """Load the model, and return the function that answers a unit and writes its file."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputMissing("no GPU visible, but the plan says device=cuda", fix="add --gpus-per-worker 1")
        encoder, model = self.encoder(), speaker_of(self.model, self.dtype, self.device)

        def make(prompts: Prompts) -> Path:
            torch.set_num_threads(self.how.threads)
            try:
                answers = list(self._answer(model, encoder, prompts.rows))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self.out_of_memory(prompts.unit) from None
            answers.sort(key=lambda answer: (answer["row"], answer.get("sample", 0)))
            content = "".join(json.dumps(answer) + "\n" for answer in answers).encode()
            path = self.folder / f"{prompts.unit:05d}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
            replace(path, content)
            return path

        return make

    def out_of_memory(self, unit: int) -> OutOfMemory:
        """A smaller batch would be another plan: answers may depend on it."""
        return OutOfMemory(
            f"unit {unit}: out of memory with {self.how.batch_size} answers at once",
            kept=f"the finished units in {self.folder}",
            fix=f"delete that folder and add --batch-size {max(1, self.how.batch_size // 2)}",
        )

    def _answer(self, model: Any, encoder: Encoder, rows: Sequence[RawRow]) -> Iterator[Answer]:
        documents, asked, rejected = read_prompts(rows, self.form, self.columns)
        yield from rejected
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        prompts, learnt = [], []
        for document, tokens in zip(documents, encoder.encode_batch(documents), strict=True):
            prompt = tokens.ids[: int(np.argmax(tokens.targets)) if tokens.status == OK else 0]
            if tokens.status != OK or len(prompt) + self.how.max_new_tokens > most:
                yield {"row": document.line, "unusable": TOO_LONG if tokens.status == OK else tokens.status}
                continue
            check_ids(tokens.ids, encoder.tokenizer, len(model.get_input_embeddings().weight))
            prompts += [(document.line, sample, prompt) for sample in range(self.how.n)]
            learnt.append(tokens)
        ends = find_turn_ends(model, encoder.tokenizer, learnt)
        for first in range(0, len(prompts), self.how.batch_size):
            batch = prompts[first : first + self.how.batch_size]
            seeds = [seed_of(self.how.seed, row, sample) for row, sample, _ in batch]
            said = generate(model, encoder.tokenizer, [p for _, _, p in batch], self.how, seeds=seeds, ends=ends)
            for (row, sample, _), seed, ids in zip(batch, seeds, said, strict=True):
                stop, ids = ("end", ids[:-1]) if ids[-1] in ends else ("length", ids)
                text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
                yield {
                    "row": row, "sample": sample, "seed": seed, "stop": stop, "ids": ids, "text": text,
                    "asked": asked[row],
                }  # fmt: skip


def read_prompts(
    rows: Iterable[RawRow], form: str, columns: Mapping[str, str]
) -> tuple[list[Document], dict[int, dict[str, Any]], list[Answer]]:
    """Documents with a stand-in for the answer; what is asked, by row; and the rows that ask nothing, with reasons."""
    documents, asked, rejected = [], {}, []
    for row in rows:
        try:
            asked[row.line], document = read_prompt("prompts", form, columns, row)
            documents.append(document)
        except RowRejected as why:
            rejected.append({"row": row.line, "unusable": why.reason})
    return documents, asked, rejected


Make = Callable[[Answering, Iterable[Prompts]], None]


def make_here(answering: Answering, jobs: Iterable[Prompts]) -> None:
    """Answer all units in this process."""
    make = answering.load()
    for prompts in jobs:
        make(prompts)
        tick(len(prompts.rows))


def write_answers(run: RunConfig, prompts: str, out: Path, make: Make = make_here, device: str = "") -> dict[str, Any]:
    """Let `run.teacher.model` answer the prompts of a corpus; finished units of the same command are kept.

    Args:
        run: Its sections documents (form and columns), teacher (model, template, length of a prompt, dtype) and
            generation.
        prompts: A file, folder, address or data set, as `xkd-cache documents` takes it; its responses are not read.
        out: A .jsonl file; a .json file of the same name has the settings and counts.
        make: How units are made: here, or on workers.
        device: cpu or cuda; that of this process unless given.

    Returns:
        out, prompts, unusable (by reason), answers, stopped (by reason), dropped (by reason), kept, tokens, made.

    Raises:
        UsageError, InputMissing: A model, file or setting cannot be used.
        BadData: No answer is kept.
        Mismatch: `out` was begun or made with other settings.
    """
    _check(run, out)
    check_model_name(base_of(run.teacher.model))
    source = open_source(prompts, form=run.documents.form, columns=run.documents.columns, prompts=True)
    folder = out.with_name(out.name + ".units")
    answering = _answering(run, source, folder, device or this_device())
    encoder = answering.encoder()
    plan, filters = json.loads(json.dumps(answering.plan(source, encoder))), run.generation.model_dump(include=FILTERS)
    if found := _find_finished(out, plan, filters):
        shutil.rmtree(folder, ignore_errors=True)
        return found | {"out": str(out), "made": 0}
    with hold_lock(folder):
        _begin(folder, plan)
        done = _finished_units(folder)
        missing = sorted(set(range(-(-source.num_rows // answering.rows_per_unit))) - done.keys())
        encoder.check(read_prompts(islice(source.rows(), TRIED), source.form, source.columns)[0])
        with (
            Progress("answers", len(missing) * answering.rows_per_unit),
            tell_kept(lambda: f"{len(_finished_units(folder))} finished units in {folder}"),
        ):
            if missing:
                make(answering, _jobs(source, answering.rows_per_unit, missing))
        found = _merge(folder, answering, out)
        record = {"plan": plan, "filters": filters, "sha256": sha256_of(out), "counts": found}
        record |= {"model": run.teacher.model, "prompts": source.name}
        replace(out.with_suffix(".json"), (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        shutil.rmtree(folder)
    return found | {"out": str(out), "made": len(missing)}


def describe(found: Mapping[str, Any]) -> str:
    """One line about what `write_answers` did."""
    parts = ["{out}: {kept} of {answers} answers to {prompts} prompts kept, {tokens} tokens".format(**found)]
    for name in ("stopped", "dropped", "unusable"):
        listed = ", ".join(f"{reason} {number}" for reason, number in found[name].items())
        parts += [f"{'prompts not used' if name == 'unusable' else name}: {listed}"] if listed else []
    return "; ".join([*parts, f"{found['made']} units made" if found["made"] else "nothing to do"])


def _check(run: RunConfig, out: Path) -> None:
    how = run.generation
    if not run.teacher.model:
        raise UsageError("no model is named", fix="add --model FOLDER")
    if out.suffix != ".jsonl":
        raise UsageError(f"--out {out} is no .jsonl file", fix=f"--out {out.with_suffix('.jsonl')}")
    if how.n > 1 and how.temperature == 0:
        raise UsageError(f"--temperature 0 gives the same answer {how.n} times", fix="--n 1, or another temperature")


def _answering(run: RunConfig, source: Source, folder: Path, device: str) -> Answering:
    """With the dtype that was chosen when the units were begun."""
    t, path = run.teacher, folder / "plan.json"
    begun = _read_json(path)["dtype"] if t.dtype == AUTO and path.is_file() else t.dtype
    template = None if t.template == AUTO else t.template
    return Answering(
        folder=folder.absolute(), model=t.model, template=template, enable_thinking=t.enable_thinking,
        max_tokens=t.max_tokens, dtype=choose_dtype(begun, device).dtype, device=device, form=source.form,
        columns=source.columns, how=run.generation,
    )  # fmt: skip


def _find_finished(out: Path, plan: Mapping[str, Any], filters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The counts of the finished file of just this command; None where there is no file yet."""
    path = out.with_suffix(".json")
    if not path.exists():
        if out.exists() and not out.with_name(out.name + ".units").exists():
            raise UsageError(f"{out} was not written by this command", kept="it as it is", fix="--out OTHER.jsonl")
        return None
    record = _read_json(path)
    _refuse_other(out, {**plan, "filters": filters}, {**record["plan"], "filters": record["filters"]})
    if not out.exists() or sha256_of(out) != record["sha256"]:
        raise Mismatch(
            f"{out} is not the file that {path} describes", kept="both as they are",
            fix=f"give your own file another name, delete {path}, and run this again",
        )  # fmt: skip
    return dict(record["counts"])


def _read_json(path: Path) -> dict[str, Any]:
    """A plan or a record; Mismatch where the file is something else, or damaged."""
    try:
        found = json.loads(path.read_bytes())
        if "dtype" in found.get("plan", found):
            return dict(found)
    except (ValueError, TypeError, AttributeError):
        pass
    raise Mismatch(f"{path} does not describe answers", kept="it as it is", fix="--out OTHER.jsonl")


def _refuse_other(where: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if rows := differences(dict(ours), dict(theirs)):
        listed = "; ".join(f"{name} was {before}, is {now}" for name, now, before in rows[:6])
        raise Mismatch(f"{where} belongs to other settings: {listed}", kept="it as it is", fix="--out OTHER.jsonl")


def _begin(folder: Path, plan: Mapping[str, Any]) -> None:
    path = folder / "plan.json"
    if path.exists():
        _refuse_other(folder, plan, _read_json(path))
    else:
        replace(path, json.dumps(plan, sort_keys=True).encode())


def _finished_units(folder: Path) -> dict[int, Path]:
    """Files of whole units, by number; damaged ones are removed, and made again."""
    found = {}
    for path in sorted(folder.iterdir()):
        if name := _UNIT.fullmatch(path.name):
            if sha256_of(path).startswith(name[2]):
                found[int(name[1])] = path
            else:
                remove(path)
    return found


def _jobs(source: Source, size: int, missing: Sequence[int]) -> Iterator[Prompts]:
    """The rows of the missing units; the source is read forward once, from the first row that is needed."""
    at = missing[0] * size
    rows = source.rows(at)
    for unit in missing:
        own = list(islice(rows, unit * size - at, (unit + 1) * size - at))
        at = (unit + 1) * size
        yield Prompts(unit=unit, rows=own)


def _merge(folder: Path, answering: Answering, out: Path) -> dict[str, Any]:
    """Write the answers that are kept, and count all."""
    how, form = answering.how, answering.form
    unusable, stopped, dropped, tokens, rows = Counter[str](), Counter[str](), Counter[str](), 0, set[int]()

    def write(path: Path) -> None:
        nonlocal tokens
        with path.open("wb") as stream:
            for _, unit in sorted(_finished_units(folder).items()):
                for answer in map(json.loads, unit.read_bytes().splitlines()):
                    rows.add(answer["row"])
                    if "unusable" in answer:
                        unusable[answer["unusable"]] += 1
                        continue
                    stopped[answer["stop"]] += 1
                    if reason := _why_dropped(answer, how):
                        dropped[reason] += 1
                        continue
                    tokens += len(answer["ids"])
                    stream.write(json.dumps(_row(answer, form, how.policy), ensure_ascii=False).encode() + b"\n")
        if stopped.total() == dropped.total():
            counts = ", ".join(f"{reason} {number}" for reason, number in (unusable + dropped).most_common())
            raise BadData(
                f"no answer to {len(rows)} prompts is kept: {counts or 'there are none'}",
                kept=f"all answers in {folder}",
                fix="lower --max-new-tokens, with another --out" if TOO_LONG in unusable else
                "raise --max-new-tokens (another --out), add --keep-cut, or change --min-tokens, --max-repeat",
            )  # fmt: skip

    save_file(out, write)
    return {
        "prompts": len(rows), "unusable": _sorted(unusable), "answers": stopped.total(), "stopped": _sorted(stopped),
        "dropped": _sorted(dropped), "kept": stopped.total() - dropped.total(), "tokens": tokens,
    }  # fmt: skip


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _why_dropped(answer: Answer, how: GenerationSection) -> str:
    """The first filter that an answer does not pass; "" where it is kept."""
    if len(answer["ids"]) < how.min_tokens or not answer["text"].strip():
        return "short"
    if repeats(answer["ids"], how.max_repeat):
        return "repeated"
    return "cut" if answer["stop"] == "length" and not how.keep_cut else ""


def _row(answer: Answer, form: str, policy: str) -> dict[str, Any]:
    row = with_answer(form, answer["asked"], answer["text"]) | ({POLICY: policy} if policy else {})
    about = {name: answer[name] for name in ("row", "sample", "seed", "stop")}
    return row | {"generated": about | {"tokens": len(answer["ids"])}}
