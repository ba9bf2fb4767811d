"""`verify`, `repair`, `gc`, `drop` and `export` of a finished cache.

May import: stages and below.
Lost without it: care of caches; they are made and read all the same.
"""
