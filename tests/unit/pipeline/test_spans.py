import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from xkd_pipeline.parsing.spacy_parser import cut_pieces, select_phrases, trim, verb_groups

LETTERS = {"AUX": "A", "ADV": "D", "VERB": "V", "NOUN": "n"}


@given(st.lists(st.sampled_from(sorted(LETTERS)), max_size=12))
def test_verb_groups_are_all_matches_that_lie_in_no_other(tags: list[str]) -> None:
    word = "".join(LETTERS[tag] for tag in tags)
    every = [(i, j) for i in range(len(word)) for j in range(i + 1, len(word) + 1)]
    matches = [(i, j) for i, j in every if re.fullmatch("A*D*V+D*", word[i:j])]
    maximal = [(i, j) for i, j in matches if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in matches)]

    assert list(verb_groups(tags)) == maximal


PHRASE = st.tuples(st.integers(0, 12), st.integers(1, 8), st.sampled_from(["NP", "VP"]))
PHRASES = st.lists(PHRASE.map(lambda p: (p[0], p[0] + p[1], p[2])), max_size=12)


@given(found=PHRASES, max_words=st.integers(0, 4), drop_contained=st.booleans())
def test_the_kept_phrases_are_those_of_the_obvious_definition(
    found: list[tuple[int, int, str]], max_words: int, drop_contained: bool
) -> None:
    words = [(i, i + 1) for i in range(0, 20, 2)]
    notes: Counter[str] = Counter()

    kept = select_phrases(found, words, max_words=max_words, drop_contained=drop_contained, notes=notes)

    sizes = {p: sum(p[0] <= a and b <= p[1] for a, b in words) for p in found}
    fitting = {p for p in found if sizes[p] and (not max_words or sizes[p] <= max_words)}
    single = {p for p in fitting if p[2] == "NP" or (p[0], p[1], "NP") not in fitting}
    if drop_contained:
        single = {p for p in single if not any(q[0] <= p[0] and p[1] <= q[1] and q[:2] != p[:2] for q in single)}
    assert kept == sorted(single, key=lambda p: (p[0], -p[1]))
    assert notes["phrase_too_long"] == sum(bool(max_words) and sizes[p] > max_words for p in found)


@given(st.text(alphabet="a \n\u3000", max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_trimmed_intervals_hold_the_stripped_text(text: str, a: int, b: int) -> None:
    start, end = sorted((min(a, len(text)), min(b, len(text))))

    at, to = trim(text, start, end)

    assert text[at:to] == text[start:end].strip()
    assert start <= at <= to <= end


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9))
def test_pieces_cover_the_text_and_end_after_a_blank_where_there_is_one(text: str, limit: int) -> None:
    pieces = list(cut_pieces(text, limit))

    assert "".join(text[start:end] for start, end in pieces) == text
    assert all(0 < end - start <= limit for start, end in pieces)
    for start, end in pieces[:-1]:
        assert text[end - 1].isspace() or not any(c.isspace() for c in text[start:end])


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9), st.integers(1, 9))
def test_no_piece_holds_a_longer_run_without_blanks_than_asked_for(text: str, limit: int, run: int) -> None:
    pieces = list(cut_pieces(text, limit, run))

    assert "".join(text[start:end] for start, end in pieces) == text
    assert all(len(word) <= min(run, limit) for start, end in pieces for word in text[start:end].split())
    whole = {end for _, end in cut_pieces(text, limit)}
    assert whole <= {end for _, end in pieces}
    assert pieces == list(cut_pieces(text, limit)) or any(len(word) > run for word in text.split())
