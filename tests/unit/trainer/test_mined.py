"""MinED: distances, maps and partners against the definitions, the carried logits, and the wired loss."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import one_tokenizer as one
import slow_chunks as slow
import slow_losses as tools
import tiny_models as tiny
from xkd_schemas.errors import UsageError
from xkd_schemas.tokens import predictors
from xkd_trainer.losses.baselines import mined
from xkd_trainer.losses.baselines.mined import _search, partners, read_bare, vocabulary_map

WORDS = st.text("abAé", max_size=6).map(lambda text: text.encode())
LONG = st.text("ab", min_size=55, max_size=75).map(lambda text: text.encode())


@settings(max_examples=30, deadline=None)
@given(queries=st.lists(WORDS | LONG, max_size=5), texts=st.lists(WORDS | LONG, min_size=1, max_size=12))
def test_nearest_string_is_that_of_a_full_search(queries: list[bytes], texts: list[bytes]) -> None:
    found = _search(queries, {7 * n: text for n, text in enumerate(texts)})

    assert found.tolist() == [7 * slow.nearest(query, texts) for query in queries]


def test_the_search_for_nearest_classes_is_counted_and_does_not_depend_on_its_pieces(monkeypatch, capsys) -> None:
    source, target = (
        {text: n for n, text in enumerate(texts)} for texts in (["aa", "abx", "cdd"], ["ab", "cd", "aa"])
    )
    whole = vocabulary_map(source, target, "nearest").tolist()
    monkeypatch.setattr("xkd_schemas.progress.EVERY", -1.0)  # every tick is shown
    monkeypatch.setattr("xkd_trainer.losses.baselines.mined.SEARCHED", 1)

    assert vocabulary_map(source, target, "nearest").tolist() == whole == [2, 0, 1]
    assert "mined: nearest classes: 1 of 2 classes" in capsys.readouterr().err


def test_a_long_search_is_made_once_and_a_damaged_result_is_searched_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("xkd_trainer.losses.baselines.mined.LONG_SEARCH", 0)
    searches, source = [], {"aa": 0, "abx": 1, "cdd": 2}
    monkeypatch.setattr(mined, "_search", lambda *asked, real=mined._search: searches.append(asked) or real(*asked))

    def find(*targets: str) -> list[int]:
        return vocabulary_map(source, {text: n for n, text in enumerate(targets)}, "nearest").tolist()

    assert [find("ab", "cd", "aa"), find("ab", "cd", "aa"), find("cd", "ab", "aa")] == [[2, 0, 1]] * 2 + [[2, 1, 0]]
    assert len(searches) == 2
    for path in (kept := sorted((tmp_path / "home" / "xkd").iterdir())):
        path.write_bytes(path.read_bytes().replace(b"[0,1]", b"[1,1]").replace(b"[1,0]", b"[1,1]"))
    assert [find("ab", "cd", "aa"), find("ab", "cd", "aa")] == [[2, 0, 1]] * 2
    assert (len(searches), len(kept)) == (3, 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept[0]))  # a file: nothing can be kept
    assert find("ab", "cd", "aa") == [2, 0, 1]
    assert "the next run searches again" in capsys.readouterr().err


def test_a_token_of_text_is_taken_before_a_byte_token_and_a_blank_counts_only_where_it_is_equal() -> None:
    target = {"<0x41>": 0, "A": 1, "▁B": 2, "▁": 3, "C": 4, "▁C": 5}

    source = {"A": 0, "ĠA": 1, "B": 2, "ĠC": 3, "C": 4, "D": 6}

    assert vocabulary_map(source, target, "exact").tolist() == [1, 1, 2, 5, 4, -1, -1]


TOKENS = st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"abc", b"bc", b"c"]), max_size=7)


@settings(max_examples=80, deadline=None)
@given(
    documents=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4),
    fill=st.integers(0, 6), cells=st.sampled_from([1, 9, 512]),
)  # fmt: skip
def test_partners_are_those_of_the_walk_through_the_table(
    documents: list[tuple[list[bytes], list[bytes]]], fill: int, cells: int
) -> None:
    strings = [b"", b"a", b"b", b"ab", b"abc", b"bc", b"c"]

    def side(which: int) -> Any:
        ids = [torch.tensor([strings.index(t) for t in pair[which]], dtype=torch.int64) for pair in documents]
        return dict(enumerate(strings)), tools.padded(ids, fill, 8), tools.mask([*map(len, ids), 8])[:-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mined, "BLOCK_CELLS", cells)
        found = partners(side(0), side(1))

    for row, (student, teacher) in enumerate(documents):
        assert found[row].tolist() == slow.partners(student, teacher) + [-1] * (8 - len(student))


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", ["inverse", "nearest"])
def test_the_wired_loss_is_the_loops_over_single_documents(vocabulary: str) -> None:
    made, batch = one.ready("mined", table=one.OTHER, vocabulary=vocabulary)
    vocabularies = [tiny.tokenizer_of(kind).get_vocab() for kind in ("sentencepiece", "byte_level")]
    to_teacher = vocabulary_map(*vocabularies, "nearest").tolist()
    to_student = vocabulary_map(*reversed(vocabularies), "nearest").tolist()
    if vocabulary == "inverse":
        to_teacher = [to_student.index(n) if n in to_student else -1 for n in range(len(to_teacher))]
        assert len({t for t in to_teacher if t >= 0}) == sum(t >= 0 for t in to_teacher)
    s_bytes, t_bytes = map(read_bare, vocabularies)
    positions, matched = [], 0
    for row in one.ROWS:
        own, theirs, golds = one.logits_of(made, row)
        inputs = [
            side["token_ids"][predictors(side["targets"])].tolist()
            for side in (made.cache.students[row], made.cache.teachers[row])
        ]
        found = slow.partners([s_bytes[n] for n in inputs[0]], [t_bytes[n] for n in inputs[1]])
        for number, logits, partner, gold in zip(inputs[0], own.tolist(), found, golds, strict=True):
            usable = partner >= 0 and to_student[inputs[1][partner]] == number
            positions.append((logits, theirs[partner].tolist() if usable else None, gold))
            matched += usable

    found = one.terms_of(made.distiller, batch)

    total, count = slow.mined(positions, to_teacher, 2.0)
    one.assert_term(found["mined"], total, count)
    one.assert_term(found["matched"], matched, count)
    assert 0 < matched < count


def test_without_rapidfuzz_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkd_trainer.losses.baselines.mined.importlib.util.find_spec", lambda _name: None)

    with pytest.raises(UsageError, match="mined needs rapidfuzz"):
        one.ready("mined", table=one.OTHER)
