"""Which tokens of two models end at the same character, and which tokens lie in a word or phrase.

The character is the only shared coordinate: no token string is ever compared. Nothing here
knows models, Arrow or Ray.
"""

from xkd_schemas.tokens import Int32s


def common_boundaries(student_spans: Int32s, teacher_spans: Int32s) -> Int32s:
    """Pairs [i, j]: the first i student tokens and the first j teacher tokens end at the same character."""
    raise NotImplementedError  # placeholder: written next
