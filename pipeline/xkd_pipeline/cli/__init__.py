"""The command `xkd-cache`: flags in, one line out.

May import: all of the pipeline.
Lost without it: the command; the stages still run from Python.
"""
