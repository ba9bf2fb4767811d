"""DistillTrainer in one of several processes: CACHE STUDENT OUT [RESUME]."""

import sys

from transformers import TrainingArguments

from xkd_trainer import DistillTrainer

if __name__ == "__main__":
    cache, student, out, *resume = sys.argv[1:]
    args = TrainingArguments(
        out, per_device_train_batch_size=3, max_steps=6, learning_rate=5e-4, weight_decay=0.01, seed=0, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", save_steps=5, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillTrainer(student, args, cache=cache, losses="mta+sra+dwa")
    trainer.train(resume_from_checkpoint=bool(resume))
    trainer.save_model()
