"""CPU kernels of MinED: edit distances of byte strings, the nearest string of a vocabulary, and the token alignment.

Distances are Levenshtein's over bytes, by the bit-parallel columns of Myers (1999) in Hyyro's form where the first
string has 1 to 64 bytes, else by rows. Imports numba: `mined_alignment` is imported only where it is needed.

Shape legend for this file
    B documents    N student tokens    M teacher tokens
Strings come as one array of bytes and the half-open ranges between its offsets.
"""

from typing import Any

import numpy as np

from xkd_trainer.compiled import compiled

_WORD = 64
_ONE, _NONE, _ALL = np.uint64(1), np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled
def _fill(pattern: Any, places: Any) -> None:
    """Set the bits of the places at which each byte stands in the pattern."""
    for k in range(len(pattern)):
        places[pattern[k]] |= _ONE << np.uint64(k)


@compiled
def _clear(pattern: Any, places: Any) -> None:
    for k in range(len(pattern)):
        places[pattern[k]] = _NONE


@compiled
def _columns(size: int, text: Any, places: Any) -> int:
    """Distance between the pattern of 1 to 64 bytes that `places` was filled with, and a text."""
    rising, falling, top = _ALL, _NONE, _ONE << np.uint64(size - 1)
    distance = size
    for k in range(len(text)):
        equal = places[text[k]]
        diagonal = (((equal & rising) + rising) ^ rising) | equal
        up = falling | ~(diagonal | rising)
        down = rising & diagonal
        if up & top:
            distance += 1
        elif down & top:
            distance -= 1
        up = (up << _ONE) | _ONE
        vertical = equal | falling
        rising = (down << _ONE) | ~(vertical | up)
        falling = up & vertical
    return distance


@compiled
def _rows(a: Any, b: Any) -> int:
    """The same by dynamic programming, for strings of any length."""
    row = np.arange(len(b) + 1)
    for i in range(len(a)):
        corner, row[0] = row[0], i + 1
        for j in range(len(b)):
            changed = corner + (a[i] != b[j])
            corner = row[j + 1]
            row[j + 1] = min(changed, min(corner, row[j]) + 1)
    return int(row[len(b)])


@compiled
def _classes(text: Any) -> Any:
    """Bits of the bytes that occur, modulo 64."""
    bits = _NONE
    for k in range(len(text)):
        bits |= _ONE << np.uint64(text[k] & 63)
    return bits


@compiled
def _num_bits(x: Any) -> int:
    x = x - ((x >> _ONE) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _better(query: Any, own: Any, best: Any, among: Any, targets: Any) -> Any:
    """The nearest of the texts `among[0]` to `among[1]` if it is nearer than `best` (distance, index), else `best`.

    `own` is (classes of the query, its places); the places are not read where the query is empty or long.
    """
    texts, text_at, classes = targets
    kinds, places = own
    distance, index = best
    size = len(query)
    for c in range(among[0], among[1]):
        if max(_num_bits(kinds & ~classes[c]), _num_bits(classes[c] & ~kinds)) >= distance:
            continue
        text = texts[text_at[c] : text_at[c + 1]]
        found = _columns(size, text, places) if 0 < size <= _WORD else _rows(query, text)
        if found < distance:
            distance, index = found, c
    return distance, index


@compiled
def _search(query: Any, own: Any, first_of: Any, targets: Any) -> int:
    """Index of the nearest text, lengths tried outwards from the query's own."""
    size, longest = len(query), len(first_of) - 2
    best = (1 << 30, 0)
    for gap in range(max(size, longest) + 1):
        if gap >= best[0]:
            break
        if 0 <= size - gap <= longest:
            best = _better(query, own, best, (first_of[size - gap], first_of[size - gap + 1]), targets)
        if 0 < gap < best[0] and size + gap <= longest:
            best = _better(query, own, best, (first_of[size + gap], first_of[size + gap + 1]), targets)
    return int(best[1])


@compiled
def nearest(queries: Any, texts: Any, first_of: Any, out: Any) -> None:
    """For each query, the index of the text of least distance, written to `out` int64.

    Of equally near texts the one whose length is nearest, then the shorter, then the first. Nothing is approximated:
    lengths are tried outwards until their difference alone is not less than the least distance found, and a text
    is skipped where the kinds of bytes that only one of the two has are as many as that.

    Args:
        queries: Bytes, and int64 offsets between which each query is.
        texts: The same of the texts, ordered by length; at least one.
        first_of: int64; texts of length l are first_of[l] to first_of[l + 1].
        out: One number for each query.
    """
    places = np.zeros(256, np.uint64)
    classes = np.empty(len(texts[1]) - 1, np.uint64)
    for c in range(len(classes)):
        classes[c] = _classes(texts[0][texts[1][c] : texts[1][c + 1]])
    targets = (texts[0], texts[1], classes)
    for q in range(len(out)):
        query = queries[0][queries[1][q] : queries[1][q + 1]]
        short = len(query) <= _WORD
        if short:
            _fill(query, places)
        out[q] = _search(query, (_classes(query), places), first_of, targets)
        if short:
            _clear(query, places)


@compiled
def token_costs(student: Any, student_ids: Any, teacher: Any, teacher_ids: Any, cost: Any) -> None:
    """Edit distance of each teacher token (rows) and each student token (columns)."""
    s_text, s_at = student
    t_text, t_at = teacher
    places = np.zeros(256, np.uint64)
    for i in range(len(teacher_ids)):
        a = t_text[t_at[teacher_ids[i]] : t_at[teacher_ids[i] + 1]]
        short = 0 < len(a) <= _WORD
        if short:
            _fill(a, places)
        for j in range(len(student_ids)):
            b = s_text[s_at[student_ids[j]] : s_at[student_ids[j] + 1]]
            cost[i, j] = _columns(len(a), b, places) if short else _rows(a, b)
        if short:
            _clear(a, places)


@compiled
def _accumulate(cost: Any) -> None:
    """In each cell the least sum of a path from the first cell, in place."""
    rows, columns = cost.shape
    for i in range(1, rows):
        cost[i, 0] += cost[i - 1, 0]
    for j in range(1, columns):
        cost[0, j] += cost[0, j - 1]
    for i in range(1, rows):
        for j in range(1, columns):
            cost[i, j] += min(cost[i - 1, j - 1], min(cost[i - 1, j], cost[i, j - 1]))


@compiled
def _step(sums: Any, i: int, j: int) -> tuple[int, int]:
    """The cell before (i, j) on the cheapest path: in both directions first, then along the rows."""
    if i == 0:
        return 0, j - 1
    if j == 0:
        return i - 1, 0
    if sums[i - 1, j - 1] <= min(sums[i - 1, j], sums[i, j - 1]):
        return i - 1, j - 1
    return (i - 1, j) if sums[i - 1, j] <= sums[i, j - 1] else (i, j - 1)


@compiled
def _only_partners(sums: Any, match: Any) -> None:
    """Walk the cheapest path back, and write the row of each column that has exactly one; -1 to the others."""
    i, j = sums.shape[0] - 1, sums.shape[1] - 1
    several = np.zeros(j + 1, np.bool_)
    match[j] = i
    while i > 0 or j > 0:
        i, j = _step(sums, i, j)
        several[j] |= match[j] >= 0
        match[j] = i
    match[several] = -1


@compiled
def partners_of_batch(student: Any, teacher: Any, match: Any) -> None:
    """Time warping of each document's token strings: the teacher token that alone stands beside each student token.

    Args:
        student: (bytes, offsets by id) of the token strings, ids int64 [B, N], lengths int64 [B].
        teacher: The same with ids [B, M].
        match: int64 [B, N], filled with -1; gets the index of the partner where there is exactly one.
    """
    s_texts, s_ids, s_lengths = student
    t_texts, t_ids, t_lengths = teacher
    for b in range(len(s_lengths)):
        n, m = s_lengths[b], t_lengths[b]
        if n > 0 and m > 0:
            cost = np.empty((m, n), np.int64)
            token_costs(s_texts, s_ids[b, :n], t_texts, t_ids[b, :m], cost)
            _accumulate(cost)
            _only_partners(cost, match[b, :n])
