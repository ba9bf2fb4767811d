"""From a run file to what a run needs: cache, student, losses. What can be refused is refused here.

The trainer imports nothing of the pipeline: where the cache was not aligned for the student's tokenizer, it says the
command, or runs `xkd-cache align` as a program of its own.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xkd_schemas.cache.table import names_in
from xkd_schemas.config import LoraSection, RunConfig
from xkd_schemas.console import note, say, warn
from xkd_schemas.documents import POLICY
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_schemas.signals import Signal
from xkd_schemas.text.encode import reading_of
from xkd_schemas.text.templates import AUTO
from xkd_schemas.text.tokenizers import identity
from xkd_trainer.data.cache import Cache, find_student, layers_of
from xkd_trainer.data.several_caches import CacheJoin, CacheUnion, parse_shards
from xkd_trainer.losses.declaration import Context, Levels, Projectors, constant_head, refuse_two_tokenizers
from xkd_trainer.losses.registry import loss_named, parse_loss, settings_of
from xkd_trainer.models.architecture import head_of, num_layers
from xkd_trainer.models.compute_dtype import dtype_named
from xkd_trainer.models.forward import check_model, checkpoint_blocks, compile_blocks, empty_model
from xkd_trainer.models.loading import load_model, load_tokenizer, new_model, stored_dtype
from xkd_trainer.models.lora import add_adapter, base_of, quantization, trained
from xkd_trainer.training.distiller import Distiller


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The cache of a run, checked against its losses; no model loaded yet."""

    cache: Cache
    tokenizer: Any
    wanted: frozenset[Signal]  # signals that batches carry


@dataclass(frozen=True, kw_only=True)
class Ready(Opened):
    """Everything checked and loaded; nothing trained yet."""

    distiller: Distiller
    save_dtype: torch.dtype  # of the finished student


def set_up(run: RunConfig, student_table: str, *, on_missing: str = "fail", quiet: bool = False) -> Ready:
    """Check and load everything; `on_missing` says what to do where the student's table is not there.

    XkdError for whatever is wrong with names, settings, fingerprints or signals, before anything is trained.
    """
    opened = open_run(run, student_table, on_missing=on_missing, quiet=quiet)
    cache, tokenizer = opened.cache, opened.tokenizer
    student, save_dtype = student_of(run, tokenizer), _save_dtype(run)
    distiller = Distiller(student, *build_losses(run, cache, student, tokenizer), packing=run.train.packing)
    if run.train.compile:
        compile_blocks(student)  # behind the rehearsal, which would compile for itself
    return Ready(**vars(opened), distiller=distiller, save_dtype=save_dtype)


def open_run(run: RunConfig, student_table: str, *, on_missing: str = "fail", quiet: bool = False) -> Opened:
    """Check everything but the student; errors and arguments as of `set_up`."""
    if not run.student.model:
        raise UsageError("no student is named", fix="--student FOLDER, a hub name, or new:llama,layers=4,width=256")
    if run.student.model.startswith("new:") and not run.student.tokenizer:
        raise UsageError("a new student needs a tokenizer", fix="--student-tokenizer FOLDER")
    settings_of(parse_loss(run.train.loss), run.losses)  # what is wrong with a loss is said before anything is loaded
    tokenizer = load_tokenizer(run.student.tokenizer or run.student.model)
    cache, wanted = open_shards(run, tokenizer, student_table, on_missing=on_missing, quiet=quiet)
    if not len(cache.rows(0, run.train.seed)):
        unusable = f"{cache.root} has no usable document for this student"
        raise UsageError(unusable, fix=f"xkd-cache show {cache.root} 0 says why, for the first")
    return Opened(cache=cache, tokenizer=tokenizer, wanted=wanted)


def open_shards(
    run: RunConfig, tokenizer: Any, student_table: str = "", *, on_missing: str = "fail", quiet: bool = False
) -> tuple[Cache, frozenset[Signal]]:
    """The cache of a run, or all of its caches as one, and the signals that its losses need; Mismatch, UsageError."""
    fingerprint, caches = identity(tokenizer), []
    shards = [parse_shards(text) for text in run.train.shards] or [(Path(run.cache), "", 1.0)]
    for root, named, _ in shards:
        of_root = run.model_copy(update={"cache": str(root)})
        table = _find_table(of_root, fingerprint, named or student_table, on_missing=on_missing, quiet=quiet)
        caches.append(Cache(root, student=table))
        _check_template(of_root, caches[-1])
    _check_skip(run, caches)
    weights = [weight for *_, weight in shards]
    if len(caches) > 1 and len({cache.documents.manifest.root for cache in caches}) < len(caches):
        join = _join(run, caches, weights)
        return join, join.wanted[0]
    cache = caches[0] if weights == [1.0] else CacheUnion(caches, weights)
    return cache, _require(run, cache, caches)


def _join(run: RunConfig, caches: Sequence[Cache], weights: Sequence[float]) -> CacheJoin:
    """Caches some of which have the same documents, as one; UsageError where not all have them."""
    first, *others = caches
    if apart := [one.root for one in others if one.documents.manifest.root != first.documents.manifest.root]:
        raise UsageError(
            f"--shards: {apart[0]} has other documents than {first.root}, and two of the caches have the same",
            fix="name caches of the same documents, or of different ones",
        )
    if len({cache.teachers.manifest.root for cache in caches}) < len(caches):
        warn("--shards: two of the caches are of one teacher, whose losses count once for each of them")
    join = CacheJoin(caches, weights, [_require(run, cache, [cache]) for cache in caches])
    if left := max(len(cache.usable) for cache in caches) - len(join.usable):
        warn(f"{left} documents are left out: a teacher could not read them, or read less of them than another")
    return join


def _require(run: RunConfig, cache: Cache, parts: Iterable[Cache]) -> frozenset[Signal]:
    """The signals that the losses read of a cache; UsageError where a part lacks any or has two tokenizers."""
    names, levels = parse_loss(run.train.loss), _levels(cache)
    settings = settings_of(names, run.losses)
    needs = {name: loss_named(name).needs(settings[name], levels) for name in names}
    for part in parts:
        for name, signals in needs.items():
            if loss_named(name).one_tokenizer and part.has_head:  # before a pass of the teacher is asked for
                refuse_two_tokenizers(f"loss {name}", _tokenizer_differences(part))
            part.require(name, signals)
    return frozenset(signal for signals in needs.values() for signal in signals)


def _check_skip(run: RunConfig, caches: Sequence[Cache]) -> None:
    """UsageError where cross-entropy is to skip documents and there are none of these."""
    skip = run.losses.get("ce", {}).get("skip")
    tables = [cache.documents for cache in caches if cache.documents.manifest.spec.get(POLICY)]
    if skip and not any(row[POLICY] == skip for table in tables for row in table):
        roots = ", ".join(str(cache.root) for cache in caches)
        raise UsageError(
            f"losses.ce.skip is {skip}, and no row of {roots} has that {POLICY}",
            fix=f"leave it out, or write {POLICY} into the corpus's rows and make the cache again (docs/rounds.md)",
        )


Built = tuple[Mapping[str, nn.Module], Mapping[str, float], Mapping[str, Projectors], Mapping[str, int]]


def build_losses(
    run: RunConfig, cache: Cache, student: PreTrainedModel, tokenizer: Any,
    known: Callable[[Cache], Mapping[str, Any]] = lambda _: {},
) -> Built:  # fmt: skip
    """The losses of a run, their weights, how projectors are trained, and the teachers: what a `Distiller` is made of.

    Of several teachers each has its own losses, LOSS@TEACHER, all from one seed, times its weight. What needs nothing
    of a teacher, as cross-entropy, is there once. `known` replaces fields of the losses' `Context`.
    """
    losses, weights, teachers = dict[str, nn.Module](), dict[str, float](), dict[str, int]()
    settings = settings_of(parse_loss(run.train.loss), run.losses)
    for number, (label, (one, factor)) in enumerate(cache.by_teacher.items()):
        levels = _levels(one)
        context = replace(context_of(one, student, tokenizer, levels), **known(one))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.train.seed + 1)  # projectors must not depend on how the student was made
            for name, weight in parse_loss(run.train.loss).items():
                declared = loss_named(name)
                reads = bool(label and declared.needs(settings[name], levels))
                if reads or not number:
                    key = f"{name}@{label}" if reads else name
                    losses[key] = declared.build(settings[name], context)
                    weights[key], teachers[key] = weight * (factor if reads else 1.0), number
    return losses, weights, _projectors(run, losses), teachers


def _levels(cache: Cache) -> Levels:
    states = [s.layer for s in cache.signals if s.name == "hidden" and s.layer is not None]
    stored = [s.name for s in cache.signals]
    return Levels(layers_of(cache.signals), num_layers=cache.sizes.num_layers, states=states, stored=stored)


def student_of(run: RunConfig, tokenizer: Any, *, empty: bool = False) -> PreTrainedModel:
    """The student: loaded, or made new with the run's seed; or `empty`, under torch's device meta, of sizes alone.

    UsageError where its embedding table is smaller than the tokenizer, or it is no causal model under a plain linear
    head, which one of sizes alone does not show.
    """
    name = run.student.model
    check_student_settings(run)
    dtype = dtype_named(run.student.dtype)
    if name.startswith("new:"):
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        torch.manual_seed(run.train.seed)
        model = new_model(name.removeprefix("new:"), vocab_size=len(tokenizer), special=special, dtype=dtype)
    elif empty:
        model = empty_model(name, dtype)
    else:
        model = load_model(name, dtype=dtype, quantization=quantization(run.student.quantization))
    if not empty:
        check_fit(model, name, tokenizer)
    if run.train.lora.rank:
        torch.manual_seed(run.train.seed)
        add_adapter(model, run.train.lora, name)
    if run.train.gradient_checkpointing:
        checkpoint_blocks(model)
    return model


def check_fit(model: PreTrainedModel, name: str, tokenizer: Any) -> None:
    """UsageError where a student is no causal model under a plain linear head, or smaller than its tokenizer."""
    check_model(model)
    constant_head(head_of(model), f"student {name}", convert=False)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"student {name} has {rows} embeddings, its tokenizer {len(tokenizer)} tokens",
            fix="use the tokenizer the model was trained with",
        )


def check_student_settings(run: RunConfig) -> None:
    """UsageError where dtype, quantization, LoRA and student do not fit together."""
    name, lora = run.student.model, run.train.lora
    if run.student.dtype != "float32" and run.train.mixed_precision != "no" and not lora.rank:
        raise UsageError(
            f"with mixed precision the weights that learn stay float32, and student.dtype is {run.student.dtype}",
            fix="leave out --student-dtype, or --mixed-precision",
        )
    if run.student.quantization != "none" and not lora.rank:
        raise UsageError("weights of four bits cannot learn by themselves", fix="--lora-rank 16")
    if not lora.rank and lora != LoraSection():
        raise UsageError("settings of LoRA are given without its rank", fix="--lora-rank 16, or leave them out")
    if lora.rank and name.startswith("new:"):
        raise UsageError(f"--lora-rank adapts a trained model, {name} is a new one", fix="leave out --lora-rank")
    if base_of(name) != name:
        merge = f"xkd-train export {name} --merge --to FOLDER"
        raise UsageError(f"student {name} is an adapter", fix=f"{merge}, then --student FOLDER")


def _save_dtype(run: RunConfig) -> torch.dtype:
    if run.train.save_dtype != AUTO:
        return dtype_named(run.train.save_dtype)
    begun_here = run.student.model.startswith("new:") or run.train.lora.rank  # of LoRA the adapter is saved
    return torch.float32 if begun_here else stored_dtype(run.student.model)


def _check_template(run: RunConfig, cache: Cache) -> None:
    """Refuse a table whose template is not the one that the run names; auto takes what the table has."""
    encoder, student = reading_of(cache.students.manifest.spec["encoder"]), run.student
    asked = {"template": student.template, "enable_thinking": student.enable_thinking}
    wrong = [key for key, value in asked.items() if value not in (AUTO, None, encoder[key])]
    if wrong:
        raise Mismatch(
            f"{cache.students.folder} was made with {wrong[0]}={encoder[wrong[0]]}, this run says {asked[wrong[0]]}",
            kept="the cache as it is",
            fix=f"leave student.{wrong[0]} out, or {shlex.join(_align_command(run, 'NEW_NAME'))}",
        )


def _projectors(run: RunConfig, losses: Mapping[str, nn.Module]) -> dict[str, Projectors]:
    """How each loss's projectors are trained; UsageError where keys are set of a loss that has none."""
    found = {}
    for key, loss in losses.items():
        name = key.partition("@")[0]
        values = run.losses.get(name, {})
        found[key] = loss_named(name).parse_projectors(values, run.train.projector_lr)
        idle = sorted(set(values) & set(Projectors.model_fields))
        if idle and not trained(loss):
            raise UsageError(f"losses.{name}.{idle[0]}: {name} has no projectors here", fix=f"leave out {idle[0]}")
    return found


def context_of(cache: Cache, student: PreTrainedModel, tokenizer: Any, levels: Levels) -> Context:
    """What losses may know of both models."""
    sizes = cache.sizes
    return Context(
        student_layers=num_layers(student),
        student_width=int(student.get_input_embeddings().weight.shape[1]),
        student_vocab=tokenizer.get_vocab(),
        teacher_layers=sizes.num_layers,
        teacher_width=sizes.hidden_size,
        teacher_vocab=load_tokenizer(str(cache.teachers.folder / "tokenizer")).get_vocab(),
        teacher_vocab_size=sizes.vocab_size,
        hidden_std=sizes.hidden_std,
        embedding_std=sizes.embedding_std,
        levels=levels,
        teacher_head=cache.head,
        teacher_embeddings=cache.embeddings,
        student_head=lambda: head_of(student),
        tokenizer_differences=_tokenizer_differences(cache),
        same_tokens=cache.same_tokens,
    )


def _tokenizer_differences(cache: Cache) -> tuple[str, ...]:
    ours, theirs = (table.manifest.spec["encoder"]["tokenizer"] for table in (cache.students, cache.teachers))
    return tuple(key for key in ("vocabulary", "probe") if ours[key] != theirs[key])


def _find_table(run: RunConfig, identity: dict[str, str], name: str, *, on_missing: str, quiet: bool) -> str:
    """`find_student`, which is made first where it is missing and `align` is chosen."""
    if on_missing not in ("fail", "align"):
        raise UsageError(f"--on-missing {on_missing}: not known", fix="use fail or align")
    root = Path(run.cache)
    try:
        return find_student(root, identity, name)
    except (InputMissing, Mismatch) as error:
        if not root.is_dir() or not names_in(root, "teachers"):
            raise
        command = _align_command(run, name)
        if on_missing == "fail":
            fix = f"{shlex.join(command)}   (or add --on-missing align)"
            raise type(error)(error.what, kept=error.kept, fix=fix) from None
    _align(command, quiet)
    return find_student(root, identity, name)


def _align_command(run: RunConfig, name: str) -> list[str]:
    """The `xkd-cache align` command for the student of a run.

    >>> " ".join(_align_command(RunConfig(cache="c", student={"tokenizer": "tok", "template": "chat"}), ""))
    'xkd-cache align c --student tok --template chat --max-tokens 1024'
    """
    student, thinking = run.student, run.student.enable_thinking
    flags = {
        "--student": student.tokenizer or student.model,
        "--template": "" if student.template == AUTO else student.template,
        "--max-tokens": str(student.max_tokens),
        "--enable-thinking": "" if thinking is None else str(thinking).lower(),
        "--name": name or student.name,
        "--teacher": run.teacher.name,
    }
    return ["xkd-cache", "align", run.cache, *(word for flag in flags.items() if flag[1] for word in flag)]


def _align(command: list[str], quiet: bool) -> None:
    line = shlex.join(command)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes cannot align at once", fix=f"once, before training: {line}")
    if importlib.util.find_spec("xkd_pipeline") is None:
        raise InputMissing("xkd-cache is not installed here", fix=f"pip install 'xkd-toolkit[pipeline]', then {line}")
    note(line)
    program = "from xkd_pipeline.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *command[1:]], stdout=subprocess.PIPE, text=True, check=False
    )
    for said in done.stdout.splitlines() if not quiet else ():
        say(said)
    if done.returncode:
        raise InputMissing(f"aligning ended with exit code {done.returncode}", kept="the cache", fix=line)
