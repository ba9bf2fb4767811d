"""A table while it is written: plan, shards, commit records, seal.

May import: workers; schemas.
Lost without it: all writing of caches.
"""
