"""Text that breaks parsers and tokenizers: joined emoji, combining marks, scripts, controls, blanks of every kind."""

from hypothesis import strategies as st

NASTY = (
    " ", "  ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x00", "\x07", "\x1b[2J",
    "\u200b", "\u00ad", "\ufeff", "\u202e", "\u0301", "\ufffd", "\ue000", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44b\U0001f3fd", "\U0001f1f5\U0001f1f9", "e\u0301", "\u00e9", "\ufb01", "東京は首都です。", "שלום", "مرحبا",
    "Привет", "हिन्दी", "...", "?!", "“", "”", "—", "'", "(", "-", "x" * 70, "the", "The fox", "saw", "was running",
    "quickly", "dog", "it", "don't", "3.5%", "U.S.", ".", "!", ",", "went out.",
)  # fmt: skip

hostile_texts = st.lists(
    st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=("Cs",)), max_size=6), max_size=14
).map("".join)
"""Strings of valid Unicode; may be empty."""
