"""Rows of files to documents, or to a reason for rejecting them; the only door to datasets.

May import: documents and what stands below them.
Lost without it: reading corpora.
"""
