"""One file a paper: mathematics first, then the wiring to the cache.

May import: its own `baselines` and `ops`, data, models; schemas.
Lost without it: that paper.
"""
