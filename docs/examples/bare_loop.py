"""XKD's losses in a loop of your own: a cache, a student, AdamW."""

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from xkd_trainer import CacheDataset, Collator

STUDENT, CACHE, ACCUMULATION = "student", "cache/", 2
device = "cuda" if torch.cuda.is_available() else "cpu"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
dataset = CacheDataset(CACHE, tokenizer, "mta+sra")
distiller = dataset.distiller(student).to(device).train()
optimizer = torch.optim.AdamW(distiller.parameter_groups(lr=5e-4, weight_decay=0.01))
loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=Collator(), num_workers=1)

waiting = []
for batch in loader:
    waiting.append(batch.to(device))
    if len(waiting) < ACCUMULATION:
        continue
    counts = distiller.step_counts(waiting)  # of the whole step: every sum is divided once
    for micro_batch in waiting:
        loss, terms = distiller(micro_batch, counts)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    waiting.clear()

student.save_pretrained("out/student")
tokenizer.save_pretrained("out/student")
