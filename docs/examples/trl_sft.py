"""XKD's losses in TRL's SFTTrainer: its options, callbacks and logs, the rows and signals of a cache."""

from trl import SFTConfig, SFTTrainer

from xkd_trainer import DistillMixin

STUDENT, CACHE = "student", "cache/"


class DistillSFTTrainer(DistillMixin, SFTTrainer):
    """The mixin comes first: its loss and its data are used."""


args = SFTConfig(
    output_dir="out/sft",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    learning_rate=5e-4,
    bf16=False,
    report_to="none",
)
trainer = DistillSFTTrainer(STUDENT, args, cache=CACHE, losses="mta+sra")
trainer.train()
trainer.save_model()
