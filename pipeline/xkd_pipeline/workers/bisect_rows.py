"""Which rows of a unit kill the process that works on them: halves are tried until single rows are left."""

from collections.abc import Generator, Sequence

Search = Generator[tuple[int, ...], bool, tuple[int, ...]]
"""Yields rows to try together, is sent whether they killed their process, returns the rows that do it alone."""


def culprits(rows: Sequence[int], *, tries: int, most: int) -> Search:
    """Search `rows`, which together have killed their process.

    A group that kills once is searched further, as a wrong suspicion costs time only. A single row is a culprit after
    it has killed `tries` times in a row. Where the first half is harmless the second is taken for guilty untried, so
    rows that kill only in company give no culprit.

    >>> search = culprits(range(4), tries=2, most=9)
    >>> group = next(search)
    >>> while True:
    ...     print(group, end=" ")
    ...     try:
    ...         group = search.send(2 in group)
    ...     except StopIteration as end:
    ...         print("->", end.value)
    ...         break
    (0, 1) (2,) (3,) (2,) (2,) -> (2,)

    Args:
        rows: At least one.
        tries: How often a single row must kill.
        most: The search ends early once it has found more culprits than this.
    """
    found: list[int] = []
    suspects = [tuple(rows)]
    while suspects and len(found) <= most:
        group = suspects.pop()
        if len(group) == 1:
            if (yield from _always(group, tries)):
                found.append(group[0])
            continue
        first, second = group[: len(group) // 2], group[len(group) // 2 :]
        if not (yield first):
            suspects.append(second)
            continue
        if (yield second):
            suspects.append(second)
        suspects.append(first)
    return tuple(sorted(found))


def _always(group: tuple[int, ...], tries: int) -> Generator[tuple[int, ...], bool, bool]:
    for _ in range(tries):
        if not (yield group):
            return False
    return True
