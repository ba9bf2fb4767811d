"""The only door to altair and vl-convert: bars as SVG text that takes its colours and letters from the page.

The SVG holds no script, no style sheet and no address to fetch; every text in it is escaped by the renderer.
"""

from collections.abc import Sequence
from typing import Any, Final

from xkd_schemas.errors import UsageError

WIDTH: Final = 560
BAR: Final = 22
"""Height of a horizontal bar with its gap, in pixels."""


def bars(values: Sequence[tuple[str, float]], title: str, width: int = WIDTH) -> str:
    """Horizontal bars in the given order, one for each (name, value); `width` in pixels, without the names."""
    alt = _altair()
    rows = [{"name": name, "value": value} for name, value in values]
    axis = alt.Axis(format="~s", tickCount=5, grid=True)
    chart = alt.Chart(alt.Data(values=rows), width=width, height=BAR * len(rows)).mark_bar(size=BAR - 8)
    return _svg(
        chart.encode(
            x=alt.X("value:Q", title=title, axis=axis),
            y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        )
    )


def histogram(counts: Sequence[tuple[int, int, int]], title: str) -> str:
    """Touching bars over whole numbers, one for each (first, last, how many)."""
    alt = _altair()
    rows = [{"first": first - 0.5, "end": last + 0.5, "count": count} for first, last, count in counts]
    chart = alt.Chart(alt.Data(values=rows), width=400, height=120).mark_bar(binSpacing=1)
    return _svg(
        chart.encode(
            x=alt.X(
                "first:Q",
                title=title,
                axis=alt.Axis(grid=False, tickMinStep=1),
                scale=alt.Scale(zero=False, nice=False),
            ),
            x2="end:Q",
            y2=alt.datum(0),
            y=alt.Y("count:Q", title=None, axis=alt.Axis(format="~s", tickCount=4, tickMinStep=1)),
        )
    )


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401 # needed right after
    except ImportError as error:
        raise UsageError(f"a report needs {error.name}", fix="pip install 'xkd-toolkit[pipeline]'") from error
    return altair


def _svg(chart: Any) -> str:
    import vl_convert

    plain = chart.configure(font="sans-serif", background="transparent").configure_view(stroke=None)
    quiet = plain.configure_axis(domain=False, ticks=False, titleFontWeight="normal", labelPadding=6)
    return str(
        vl_convert.vegalite_to_svg(quiet.to_dict() | {"padding": {"left": 24, "right": 12, "top": 6, "bottom": 4}})
    )
