"""Shards made in this process or on Ray; the only door to Ray.

May import: schemas.
Lost without it: parallel work, retries, smaller batches when memory runs out.
"""
