"""A causal language model of any family: parts, states, one attention row, head, dtype; and what is measured on it.

May import: cpu_kernels; schemas.
Lost without it: every forward pass.
"""
