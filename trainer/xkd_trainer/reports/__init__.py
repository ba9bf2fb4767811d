"""What is shown of runs from their files: a page of curves, a view in a terminal.

May import: run_folder; schemas.
Lost without it: `xkd-train report`, `watch` and the tables of `sweep`.
"""
