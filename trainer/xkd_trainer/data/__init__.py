"""Three tables joined by row, padded batches, the order of rows.

May import: models; schemas.
Lost without it: reading a cache for training.
"""
