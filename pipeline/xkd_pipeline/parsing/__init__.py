"""Documents get words and phrases; the only door to spaCy and benepar.

May import: tables, workers; models of the trainer; schemas.
Lost without it: the first stage.
"""
