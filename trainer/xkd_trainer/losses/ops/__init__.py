"""What several losses share: chunks of logits, divergences, vocabularies.

May import: models, cpu_kernels; schemas.
Lost without it: the losses.
"""
