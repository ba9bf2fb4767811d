"""Numba kernels, one function each; the folder can be deleted, everything still works.

May import: numpy and numba only.
Lost without it: speed on CPUs.
"""
