"""XKD's losses in transformers' Trainer, here with LoRA."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from xkd_trainer import DistillTrainer

STUDENT, CACHE = "student", "cache/"

student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
student = get_peft_model(student, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
args = TrainingArguments(
    output_dir="out/lora",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    report_to="none",
)
trainer = DistillTrainer(student, args, cache=CACHE, losses="ce=1+mta=2")
trainer.train()
trainer.save_model()
