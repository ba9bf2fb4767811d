"""Which characters of the text a tokenizer's normalizer made its characters of.

May import: the rest of text.
Lost without it: text that normalizers change: Vietnamese, Hindi, Korean, Japanese.
"""
