"""The command `xkd-cache`: flags in, one line out.

May import: all of the pipeline but `public.py`.
Lost without it: the command; the stages still run from Python.
"""
