"""One forward pass of the teacher, and which columns become of it.

May import: tables, workers; models of the trainer; schemas.
Lost without it: the second stage.
"""
