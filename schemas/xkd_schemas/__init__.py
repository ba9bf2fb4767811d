"""The contract between the offline stage and the trainer: documents, tokens, tables, manifests, errors.

numpy, pyarrow, pydantic and xxhash only; nothing here imports torch.
"""
