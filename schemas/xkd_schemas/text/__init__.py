"""Templates, tokenizers, character offsets, alignment.

May import: corpus, tokens, documents and what stands below them.
Lost without it: the coordinate that two tokenizers share.
"""
