"""XKD's losses inside other people's training: a torch data set of a cache, its collator, and a transformers Trainer.

    dataset = CacheDataset("cache/", tokenizer, "mta+sra")
    distiller = dataset.distiller(student)
    loss, terms = distiller(Collator()([dataset[0], dataset[1]]))

docs/integrations.md has a whole script for a bare loop, for transformers and for TRL.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from xkd_schemas.config import RunConfig
from xkd_schemas.durable_files import replace
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import DocumentRow, read_row, stack_rows
from xkd_trainer.data.sampler import permute
from xkd_trainer.models.loading import load_model, load_tokenizer, save_tensors
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.prepare import build_losses, check_fit, open_shards
from xkd_trainer.training.tracking import add_values

_Trainer: Any = object  # what a mixin stands before

PROJECTORS: Final = "projectors.safetensors"
LOSSES: Final = "xkd_losses.json"
"""Files of a Trainer's checkpoint beside the student: what the losses have learnt, and which losses and cache."""


class CacheDataset(Dataset[DocumentRow]):
    """The documents of one cache or several, in the cache's order, with the signals that some losses need.

    Args:
        shards: What `xkd-train --shards` takes: a folder, or `FOLDER=WEIGHT`; or a list of them.
        tokenizer: The student's: a tokenizer, a folder or a hub name. The cache was aligned with it.
        losses: What `xkd-train --loss` takes, such as `ce=1+mta=2`.
        settings: Of single losses, as in the run file: `{"mta": {"hid": "off"}}`.
        student_table: Student table, if several fit.
        seed: Of the projectors and of `sampler`.

    Raises:
        InputMissing, Mismatch, UsageError: As `train`.
    """

    def __init__(
        self, shards: str | Path | Sequence[str | Path], tokenizer: Any, losses: str = "ce", *,
        settings: Mapping[str, Mapping[str, Any]] | None = None, student_table: str = "", seed: int = 0,
    ) -> None:  # fmt: skip
        if not tokenizer:
            raise UsageError("this student says no tokenizer", fix="processing_class=TOKENIZER")
        texts = [shards] if isinstance(shards, str | Path) else shards
        self.tokenizer = load_tokenizer(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        self.run = RunConfig.load(
            student={"tokenizer": self.tokenizer.name_or_path},
            train={"shards": [str(text) for text in texts], "loss": losses, "seed": seed},
            losses=dict(settings or {}),
        )
        self.cache, self.wanted = open_shards(self.run, self.tokenizer, student_table)

    def __len__(self) -> int:
        return len(self.cache.usable)

    def __getitem__(self, index: int) -> DocumentRow:
        return read_row(self.cache, int(self.cache.usable[index]), self.wanted)

    def distiller(self, student: Any) -> Distiller:
        """The losses around a student (a causal language model or a peft model of one), on the CPU until moved."""
        return _Carrier(student, self)

    def sampler(self) -> "EpochSampler":
        """The order of `xkd-train` with the same seed; `set_epoch` goes on to the next one."""
        return EpochSampler(self.cache, self.run.train.seed)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a training that goes on."""
        losses = {name: dict(values) for name, values in sorted(self.run.losses.items())}
        return {"cache": self.cache.identity(self.wanted), "loss": self.run.train.loss, "losses": losses}


class EpochSampler(Sampler[int]):
    """Indices of a `CacheDataset` in the shuffled order of one epoch, each cache as often as its weight says."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache, self.seed, self.epoch = cache, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cache.rows(0, self.seed))

    def __iter__(self) -> Iterator[int]:
        rows = self.cache.rows(self.epoch, self.seed)
        order = permute(len(rows), seed=self.seed, epoch=self.epoch)
        return iter(np.searchsorted(self.cache.usable, rows[order]).tolist())


class Collator:
    """Documents of a `CacheDataset` to one padded `Batch`."""

    def __call__(self, documents: Sequence[DocumentRow]) -> Batch:
        """The batch, on the CPU."""
        return stack_rows(documents)


class _Inputs(Collator):
    def __call__(self, documents: Sequence[DocumentRow]) -> Any:
        """Trainers look names up in what they hand to a model."""
        return {"batch": super().__call__(documents)}


def base_of(student: Any) -> PreTrainedModel:
    """The causal language model itself, with the layers of peft in it; UsageError where peft changes its ends."""
    if isinstance(student, PreTrainedModel):
        return student
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(student, PeftModel):
        raise UsageError(f"{type(student).__name__} is no student", fix="a transformers model, or a peft model of one")
    base: PreTrainedModel = student.get_base_model()
    ends = {"head": base.get_output_embeddings(), "input embeddings": base.get_input_embeddings()}
    wrapped = [name for name, module in ends.items() if isinstance(module, BaseTunerLayer)]
    if student.active_peft_config.is_prompt_learning or wrapped:
        what = f"an adapter on the {wrapped[0]}" if wrapped else "learnt prompts"
        raise UsageError(
            f"this peft model has {what}, which the losses would not see", fix="target the layers of attention and MLP"
        )
    return base


class _Carrier(Distiller):
    """A Distiller that a Trainer takes for its student: what it does not have itself is the student's."""

    def __init__(self, student: Any, dataset: CacheDataset) -> None:
        base = base_of(student)
        check_fit(base, str(base.name_or_path or type(base).__name__), dataset.tokenizer)
        super().__init__(base, *build_losses(dataset.run, dataset.cache, base, dataset.tokenizer))
        object.__setattr__(self, "_whole", student)  # not as a part: the parts of a peft model are in its base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_whole"], name)


class _TellEpoch(TrainerCallback):  # type: ignore[misc]
    """Also where a training goes on inside an epoch, and on several processes."""

    def __init__(self, order: EpochSampler) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.set_epoch(int((state.epoch or 0.0) + 1e-6))


class DistillMixin(_Trainer):  # type: ignore[misc]
    """What makes a Trainer train with XKD's losses from a cache: `class MyTrainer(DistillMixin, SFTTrainer): ...`.

    The counts of a step's terms are summed over accumulation and processes before it runs, and every sum is divided
    once. Projectors have learning rates of their own, and lie in each checkpoint beside the student.

    Args:
        model: A causal language model, a peft model of one, or a folder or hub name, which is loaded in float32.
        args: `TrainingArguments` or those of the other class; `data_seed`, else `seed`, is that of the order.
        cache: What `CacheDataset` takes as `shards`; or a `CacheDataset`, which has losses and settings itself.
        losses: What `xkd-train --loss` takes.
        settings: Of single losses, as in the run file.
        processing_class: The student's tokenizer; that of the model's own folder unless given.
        more: For the other class. `eval_dataset` may be a `CacheDataset` with the same losses.

    Raises:
        InputMissing, Mismatch, UsageError: As `train`; or an option does not go together with a cache.
    """

    loss_is_scaled_for_ga = True
    model: Any
    order: EpochSampler

    def __init__(
        self, model: Any, args: Any = None, *, cache: Any, losses: str = "ce",
        settings: Mapping[str, Mapping[str, Any]] | None = None, processing_class: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        args = TrainingArguments("tmp_trainer") if args is None else args
        _refuse_options(args, more)
        model = load_model(model, dtype=torch.float32) if isinstance(model, str) else model
        if not isinstance(cache, CacheDataset):
            seed = args.seed if args.data_seed is None else args.data_seed
            cache = CacheDataset(cache, processing_class or model.name_or_path, losses, settings=settings, seed=seed)
        super().__init__(
            model=model, args=args, train_dataset=_placeholder(cache, args), data_collator=_Inputs(),
            processing_class=cache.tokenizer, **more,
        )  # fmt: skip
        self.train_dataset, self.order = cache, cache.sampler()
        self.student: Any = self.model  # where it is a peft model, that is what is saved
        self.distiller = _Carrier(self.student, cache).to(args.device)
        self.model = self.model_wrapped = self.distiller
        self.model_accepts_loss_kwargs = True
        self._terms: dict[str, Tensor] = {}
        self._steps_seen = 0
        self.add_callback(_TellEpoch(self.order))

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.order

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        """What the sums of the step are divided by: the counts of all its micro-batches on all processes."""
        self._steps_seen += 1
        counts = self.distiller.step_counts(inputs["batch"].to(device) for inputs in batch_samples)
        summed: dict[str, Tensor] = self.accelerator.reduce(counts, reduction="sum")
        return summed

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss; without `num_items_in_batch` the batch is all of it."""
        loss, terms = model(inputs["batch"], num_items_in_batch, self.state.global_step)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # wrappers average over processes
            add_values(self._terms, terms)
        return (loss, terms) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of a batch of held-out documents."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The mean of each term since the last time beside the loss."""
        if "loss" in logs and self._steps_seen:
            summed = self.accelerator.reduce(self._terms, reduction="sum")
            logs |= {name: float(value) / self._steps_seen for name, value in summed.items()}
            self._terms, self._steps_seen = {}, 0
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The student's matrices, as in `xkd-train`."""
        return [name for name, values in model.named_parameters() if values.ndim >= 2]

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of `args`, with a group of its own for the projectors of each loss."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            learnt = {id(values) for values in self.distiller.losses.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [values for values in group["params"] if id(values) not in learnt]
            for group in self.distiller.projector_groups():
                optimizer.add_param_group(group)
        return self.optimizer

    @contextmanager
    def _as_student(self) -> Iterator[None]:
        """While the other class saves or loads, its model is the student."""
        self.model = self.student
        try:
            yield
        finally:
            self.model = self.distiller

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self._as_student():
            super()._save(output_dir)
        if self.args.should_save:
            folder, learnt = Path(output_dir or self.args.output_dir), self.distiller.losses.state_dict()
            save_tensors({name: values.cpu().contiguous() for name, values in learnt.items()}, folder / PROJECTORS)
            replace(folder / LOSSES, json.dumps(self.train_dataset.identity()).encode())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_projectors(Path(resume_from_checkpoint))
        with self._as_student():
            super()._load_from_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_projectors(Path(self.state.best_model_checkpoint))
        with self._as_student():
            super()._load_best_model()

    def _load_projectors(self, folder: Path) -> None:
        if not (folder / LOSSES).is_file():
            raise InputMissing(f"{folder} has no {LOSSES}", fix="choose a checkpoint that DistillTrainer has saved")
        found, ours = json.loads((folder / LOSSES).read_bytes()), json.loads(json.dumps(self.train_dataset.identity()))
        if changed := sorted(key for key in ours if found.get(key) != ours[key]):
            listed = ", ".join(f"{key} {found.get(key)}, now {ours[key]}" for key in changed)
            raise Mismatch(
                f"{folder} is of another training: {listed}",
                kept="the checkpoint", fix="the same cache and losses, or another output_dir",
            )  # fmt: skip
        self.distiller.losses.load_state_dict(load_file(folder / PROJECTORS))


class DistillTrainer(DistillMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer on a cache: `DistillTrainer(model, args, cache="cache/", losses="ce=1+mta=2").train()`.

    Arguments are those of `DistillMixin` and, but for data set, collator and optimizer, of transformers' Trainer.
    """


def _refuse_options(args: Any, more: Mapping[str, Any]) -> None:
    """UsageError for what would change the loss, or would not see all parameters."""
    ours = ("train_dataset", "data_collator", "compute_loss_func", "formatting_func", "optimizers", "model_init")
    if named := [name for name in ours if more.get(name) is not None]:
        raise UsageError(f"{named[0]} does not go together with a cache", fix=f"leave out {named[0]}")
    if args.fsdp or args.deepspeed:
        raise UsageError(
            "a Trainer with a cache runs under DDP, not FSDP or DeepSpeed", fix="accelerate launch xkd-train"
        )
    if args.n_gpu > 1:
        raise UsageError("nn.DataParallel cannot split a batch of documents", fix="accelerate launch or torchrun")
    if args.label_smoothing_factor or getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise UsageError("label smoothing and packing are not of a cache's losses", fix="leave them off")


def _placeholder(dataset: CacheDataset, args: Any) -> Any:
    """What the other class is given as its data set: TRL looks into it, and takes one of `datasets` only."""
    if not hasattr(args, "dataset_kwargs"):
        return dataset
    from datasets import Dataset as HubDataset  # TRL has it

    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return HubDataset.from_dict({"row": list(range(len(dataset)))})
