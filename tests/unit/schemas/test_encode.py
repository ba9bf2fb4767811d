"""What four kinds of tokenizer make of hostile text, alone and in pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

import four_tokenizers
from four_tokenizers import KINDS, encoder_of, lone, nasty_documents, question
from slow_alignment import align_one
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import row_offsets
from xkd_schemas.text.encode import BORDER_REACH, REASONS, Encoder
from xkd_schemas.text.tokenizers import Encoded, EncodedText, blanks, content_intervals
from xkd_schemas.tokens import CONTENT, END, OK, TEMPLATE, Tokens


def solid(text: str, start: int, end: int) -> set[int]:
    return {at for at in range(start, end) if not text[at].isspace()}


def check(document: Document, tokens: Tokens) -> None:
    text, content = document.text, tokens.spans[tokens.kinds == CONTENT]
    assert len(tokens.ids) == len(tokens.spans) == len(tokens.kinds) == len(tokens.targets)
    assert (np.diff(content, axis=0) >= 0).all()
    assert (content[:, 0] <= content[:, 1]).all()
    assert (tokens.spans[tokens.kinds == TEMPLATE] == -1).all()
    covered: set[int] = set()
    for start, end in content.tolist():
        assert 0 <= start <= end <= tokens.num_chars <= len(text)
        assert any(s.start <= start and end <= s.end for s in document.segments)
        assert not text[start:end] or not text[start].isspace() or text[start:end].isspace()
        covered |= set(range(start, end))
    assert solid(text, 0, tokens.num_chars) <= covered
    ends = tokens.spans[tokens.kinds == END]
    assert ends.tolist() == [[s.end, s.end] for s in document.segments if s.target and s.end <= tokens.num_chars]
    targets = [s for s in document.segments if s.target]
    for at in np.flatnonzero(tokens.targets):
        start, end = tokens.spans[at].tolist()
        assert tokens.kinds[at] != TEMPLATE
        assert any(s.start <= start and end <= s.end for s in targets)
    assert not tokens.targets[0]
    assert tokens.targets.any()
    assert tokens.kinds[-1] != TEMPLATE


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(document=nasty_documents)
def test_intervals_are_in_order_and_cover_the_text_or_a_reason_says_why(kind: str, document: Document) -> None:
    tokens = encoder_of(kind).encode(document)

    if tokens.status == OK:
        check(document, tokens)
        assert tokens.num_chars == len(document.text)
        assert any(s.target for s in document.segments)
    else:
        takes_all = kind in ("byte_level", "sentencepiece")  # no normaliser
        assert tokens.status in ({"no_target"} if takes_all else REASONS)
        assert len(tokens.ids) == len(tokens.spans) == len(tokens.kinds) == len(tokens.targets) == 0


@settings(deadline=None, max_examples=200)
@given(student_kind=st.sampled_from(KINDS), teacher_kind=st.sampled_from(KINDS), document=nasty_documents)
def test_aligned_spans_cover_the_same_characters(student_kind: str, teacher_kind: str, document: Document) -> None:
    student, teacher = encoder_of(student_kind).encode(document), encoder_of(teacher_kind).encode(document)

    ours, theirs = align_one(student, teacher, np.array([s.end for s in document.segments]))

    assert ours.shape == theirs.shape
    for spans in (ours, theirs):
        assert (spans[:, 0] < spans[:, 1]).all()
        assert (spans[1:, 0] >= spans[:-1, 1]).all()
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        assert set(student.kinds[slice(*a)].tolist()) == set(teacher.kinds[slice(*b)].tolist())
        assert characters(document, student, *a) == characters(document, teacher, *b)
    if student.status == teacher.status == OK:
        assert int((student.kinds == END).sum()) == int((student.kinds[ours[:, 0]] == END).sum())
        if student_kind == teacher_kind:
            every = set().union(*(characters(document, student, *span) for span in ours.tolist()))
            assert every == solid(document.text, 0, len(document.text))


def characters(document: Document, tokens: Tokens, first: int, end: int) -> set[int]:
    covered = {at for start, stop in tokens.spans[first:end].tolist() for at in range(start, stop)}
    return {at for at in covered if not document.text[at].isspace()}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(document=nasty_documents, max_tokens=st.integers(2, 30))
def test_a_cut_row_fits_and_is_what_encoding_to_the_cut_gives(kind: str, document: Document, max_tokens: int) -> None:
    whole = encoder_of(kind).encode(document)
    tokens = encoder_of(kind, max_tokens=max_tokens).encode(document)

    assert len(tokens.ids) <= max_tokens
    if tokens.status == OK:
        check(document, tokens)
        again = encoder_of(kind).encode(document, tokens.num_chars)
        for name in ("ids", "spans", "kinds", "targets"):
            assert getattr(again, name).tolist() == getattr(tokens, name).tolist()
        assert again.num_chars == tokens.num_chars
    if whole.status == OK and len(whole.ids) <= max_tokens:
        assert tokens.num_chars == whole.num_chars


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(document=nasty_documents, share=st.floats(0, 1))
def test_encoding_to_a_character_is_encoding_the_text_to_there(kind: str, document: Document, share: float) -> None:
    num_chars = int(share * len(document.text))
    shorter = document_of(
        [(s.role, document.text[s.start : min(s.end, num_chars)], s.target) for s in document.segments
         if s.start < num_chars], source="s", line=1,
    )  # fmt: skip

    part, own = encoder_of(kind).encode(document, num_chars), encoder_of(kind).encode(shorter)

    if OK == part.status == own.status:
        finished = all(s.end <= num_chars for s in document.segments if s.target and s.start < num_chars)
        length = len(own.ids) if finished else len(own.ids) - 1  # without the end token
        assert part.ids.tolist() == own.ids[:length].tolist()
        assert part.spans.tolist() == own.spans[:length].tolist()
        assert part.targets.tolist() == own.targets[:length].tolist()
        assert part.extended == own.extended
    assert part.num_chars == num_chars


def test_a_start_token_a_prompt_a_response_and_an_end_token() -> None:
    tokenizer = four_tokenizers.tokenizer_of("sentencepiece")  # puts <s> before every text by itself
    tokens = encoder_of("sentencepiece").encode(question("Who?", "A keeper."))

    assert tokenizer.convert_ids_to_tokens(tokens.ids[[0, -1]].tolist()) == ["<s>", "</s>"]
    assert tokens.kinds[[0, 1, -1]].tolist() == [TEMPLATE, CONTENT, END]
    assert tokens.spans[-1].tolist() == [13, 13]
    assert tokens.targets.tolist() == [bool(start >= 4) for start in tokens.spans[:, 0]]


def test_a_text_that_is_a_target_from_its_first_token_gets_a_start_token() -> None:
    tokens = encoder_of("byte_level").encode(lone("lamp"))
    other = encoder_of("byte_level").encode(question("lamp", "lamp"))

    assert tokens.kinds[0] == TEMPLATE
    assert tokens.ids[0] == four_tokenizers.tokenizer_of("byte_level").bos_token_id
    assert other.kinds[0] == CONTENT


def test_blanks_glued_to_the_front_are_left_out_and_tokens_of_blanks_keep_them() -> None:
    text = "the lamp  on\n\nthe wall"
    tokens = encoder_of("byte_level").encode(lone(text))

    pieces = [text[start:end] for start, end in tokens.spans[tokens.kinds == CONTENT].tolist()]

    assert "".join(pieces) == text.replace("the lamp", "thelamp").replace("  on", " on").replace("the wall", "thewall")
    assert {" ", "\n"} <= set(pieces)
    assert not any(piece[0].isspace() and not piece.isspace() for piece in pieces)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("wordpiece", "\u0000 \ufffd", "uncovered_characters"),
        ("wordpiece", "\u0301", "uncovered_characters"),
        ("byte_level", "", "no_target"),
        ("byte_level", "\ud800", "lone_surrogate"),
    ],
)
def test_the_reason_is_the_right_one_and_spoils_no_other_document(kind: str, text: str, reason: str) -> None:
    rows = encoder_of(kind).encode_batch([question("Hello", text), question("a", "b")])

    assert [row.status for row in rows] == [reason, OK]
    assert len(rows[0].ids) == 0


def intervals_of(document: Document, offsets: list[np.ndarray]) -> tuple[np.ndarray, str]:
    """Between a document that lies wrong in every way and an empty one, so that neither touches the other."""
    segments = [(s.start, s.end) for s in document.segments]
    pairs = np.concatenate([np.array([(5, 9), (1, 0)], np.int32), *offsets])
    read = EncodedText(
        texts=["ab", document.text, ""], document_G=np.array([0, *(1 for _ in segments)]),
        segments_G2=np.array([(0, 2), *segments], np.int32),
        encoded=Encoded(np.zeros(0, np.int32), pairs, row_offsets([2, *map(len, offsets)])),
    )  # fmt: skip
    spans, statuses = content_intervals(read)
    assert statuses[0::2] == ["outside_text", OK]
    return spans[2:], statuses[1]


@pytest.mark.parametrize(
    ("offsets", "status"),
    [
        ([(0, 2), (2, 5)], OK), ([(0, 3), (2, 5)], OK), ([(0, 2), (2, 6)], "outside_text"),
        ([(-1, 2), (2, 5)], "outside_text"), ([(0, 2), (5, 2)], "outside_text"),
        ([(2, 5), (0, 5)], "offsets_not_monotone"), ([(0, 5), (2, 4)], "offsets_not_monotone"),
        ([(0, 2), (4, 5)], "uncovered_characters"), ([(1, 2), (2, 5)], "uncovered_characters"),
        ([(0, 2), (2, 4)], "uncovered_characters"), ([], "uncovered_characters"),
    ],
)  # fmt: skip
def test_offsets_that_lie_are_found(offsets: list[tuple[int, int]], status: str) -> None:
    document = lone("abxcd")
    pairs = np.array(offsets, np.int32).reshape(-1, 2)

    assert intervals_of(document, [pairs])[1] == status


def test_a_token_trimmed_to_nothing_gets_its_blanks_back_and_others_stay_empty_or_share_the_last_interval() -> None:
    trimmed = [np.array([(0, 1), (3, 3), (3, 4), (6, 6)], np.int32)]
    empty = [np.array([(0, 0), (0, 2), (2, 2)], np.int32), np.array([(0, 0), (0, 2)], np.int32)]

    blank, blank_status = intervals_of(lone("a  b  "), trimmed)
    spans, status = intervals_of(question("ab", "cd"), empty)

    assert (blank.tolist(), blank_status) == ([[0, 1], [1, 3], [3, 4], [4, 6]], OK)
    assert (spans.tolist(), status) == ([[0, 0], [0, 2], [0, 2], [2, 2], [2, 4]], OK)


def test_a_byte_level_tokenizer_that_trims_its_offsets_gives_the_same_intervals() -> None:
    trimming = four_tokenizers.fresh("byte_level")
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    document = question("the lamp  on   the\n\n wall ", " a \n b  ")

    ours = Encoder(tokenizer=trimming, template="none", max_tokens=100).encode(document)

    assert ours.spans.tolist() == encoder_of("byte_level").encode(document).spans.tolist()


def test_a_cut_is_made_behind_a_word() -> None:
    text = "the old lamp on the harbour wall was lit every evening"
    document = lone(text)

    for max_tokens in range(4, 30):
        tokens = encoder_of("byte_level", max_tokens=max_tokens).encode(document)
        if tokens.num_chars < len(text):
            assert text[tokens.num_chars] == " "
            assert text[tokens.num_chars - 1] != " "
            assert END not in tokens.kinds.tolist()


def test_a_text_without_a_word_border_in_reach_is_cut_behind_a_whole_token() -> None:
    solid, far = (lone(text) for text in ("東読夜河字静走漢" * 60, "lamp " + "漢" * (BORDER_REACH + 400)))

    tokens = encoder_of("byte_level", max_tokens=300).encode(solid)

    assert (tokens.status, tokens.num_chars < 480, 290 <= len(tokens.ids) <= 300) == (OK, True, True)
    assert encoder_of("sentencepiece", max_tokens=BORDER_REACH * 3 + 60).encode(far).num_chars > BORDER_REACH
    assert encoder_of("sentencepiece", max_tokens=60).encode(far).num_chars == 4


def test_blanks_are_the_white_space_of_python() -> None:
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)

    assert blanks(every).tolist() == [char.isspace() for char in every]


def test_wrong_settings_are_refused_in_one_line() -> None:
    tokenizer = four_tokenizers.fresh("byte_level")

    with pytest.raises(UsageError, match=r"template 'alpacca' is not known.*none, alpaca, chat"):
        Encoder(tokenizer=tokenizer, template="alpacca", max_tokens=10)
    with pytest.raises(UsageError, match=r"max_tokens is 1,"):
        Encoder(tokenizer=tokenizer, template="none", max_tokens=1)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match=r"has no end token"):
        Encoder(tokenizer=tokenizer, template="none", max_tokens=10)
