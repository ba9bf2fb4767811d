"""verify, repair and gc as commands, and rows against the live teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import small_cache
from damages import flip, resealed
from fake_hardware import hardware_is
from small_cache import asked
from xkd_pipeline.capture.capture import capture
from xkd_pipeline.cli.app import app
from xkd_pipeline.maintain.recompute import _compare_classes, _live_settings, recompute
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.maintain.verify_rows import _check_values
from xkd_pipeline.tables.dataset_card import table_states
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import BadData, Mismatch, UsageError


def test_a_whole_cache_is_whole_at_every_level() -> None:
    for level in ("quick", "full", "deep"):
        code, said = asked("verify", small_cache.made() / "cache", "--level", level)
        assert (code, said["bad"], said["whole"]) == (0, [], True)


def test_a_damaged_shard_is_exit_65_and_named(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    shard = sorted((cache / "teachers/T").glob("00001-*.arrow"))[0]
    flip(shard)
    assert verify(cache, "quick") == []

    code, said = asked("verify", cache)

    assert code == 65
    assert [(b["table"], b["unit"]) for b in said["bad"]] == [("teachers/T", 1)]
    result = CliRunner().invoke(app, ["verify", str(cache)])
    assert isinstance(result.exception, BadData)
    assert shard.name in result.stdout
    for command, said in (("verify", "1 problem found in"), ("repair", "1 problem left in")):
        assert str(CliRunner().invoke(app, [command, str(cache)]).exception).startswith(f"{said} {cache}. Next: ")


@pytest.mark.parametrize(("key", "named"), [("unit", 0), ("file", 1)])
def test_a_manifest_that_names_another_shard_in_a_place_is_bad(key: str, named: int, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    resealed(cache, "students/S", lambda data: data["commits"][1].update({key: data["commits"][0][key]}))

    assert f"the manifest names shard {named} here" in [one.reason for one in verify(cache, "quick")]


def test_a_table_that_was_only_begun_is_one_line(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    begun = cache / "students" / "begun"
    (begun / "commits").mkdir(parents=True)
    for name in ("plan.json", "commits/00000.json"):
        (begun / name).write_bytes((cache / "students/S" / name).read_bytes())
    (found,) = verify(cache, "quick")
    assert found.reason == "missing: the table is not finished, 1 of 3 shards are done"


def test_what_is_no_level_is_said() -> None:
    with pytest.raises(UsageError, match=r"'shallow' is not known\. Next: use one of: quick, full, deep"):
        verify(small_cache.made() / "cache", "shallow")


def test_the_live_teacher_runs_in_the_tables_dtype_where_that_is_fast_and_otherwise_in_float32(monkeypatch) -> None:
    model = str(small_cache.made() / "teacher")
    spec = Table(small_cache.made() / "cache", "teachers/T").manifest.spec | {"dtype": "bfloat16"}

    hardware_is(monkeypatch, has_bfloat16=False, factor=63.4)
    assert [_live_settings(spec, model, asked).dtype for asked in ("auto", "bf16")] == ["float32", "bfloat16"]
    hardware_is(monkeypatch, has_bfloat16=True, factor=0.5)
    assert [_live_settings(spec, model, asked).dtype for asked in ("auto", "fp32")] == ["bfloat16", "float32"]


def live_says(monkeypatch: pytest.MonkeyPatch, column: str, change: Callable[[Any], Any]) -> Path:
    """The live teacher gives another column; the folder of the small cache."""

    def changed(*given: object) -> list[dict[str, object]]:
        (row,) = capture(*given)
        return [row | {column: change(row[column])}]

    monkeypatch.setattr("xkd_pipeline.maintain.recompute.capture", changed)
    return small_cache.made()


def test_rows_that_do_not_agree_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = live_says(monkeypatch, "hidden_last", lambda states: states[::-1])
    found = recompute(made / "cache", "teachers/T", str(made / "teacher"), 2)
    assert found.rows == 2
    assert any(one.unit == 0 and "hidden_last differs by" in one.reason for one in found.bad)


def test_differences_within_rounding_are_measured_and_no_reason_to_call_a_row_bad(monkeypatch) -> None:
    made = live_says(monkeypatch, "entropy", lambda entropy: entropy * 1.01)
    found = recompute(made / "cache", "teachers/T", str(made / "teacher"), 2)
    assert found.bad == []
    assert found.differences["entropy"] == pytest.approx(0.01, rel=0.05)
    assert found.line.endswith("columns differ within rounding, by 0.01 at most (entropy)")

    command = ["verify", str(made / "cache"), "--recompute", "2", "--model", str(made / "teacher")]
    assert f"2 rows recomputed in float32: {found.line}" in CliRunner().invoke(app, command).output


def test_classes_whose_logits_are_no_further_apart_than_rounding_may_change_places() -> None:
    ids, logits = np.array([[7, 3, 9, 1]] * 4), np.array([[20.0, 19.0, 12.0, 11.5]] * 4)

    assert _compare_classes("topk_ids#2", np.array([[3, 7]] * 4), ids, logits) == ""
    assert _compare_classes("argmax", np.array([3, 7, 3, 7]), ids, logits) == ""
    assert _compare_classes("argmax", np.array([7, 7, 9, 7]), ids, logits).startswith("argmax: 25.0 % are not what")
    assert _compare_classes("topk_ids#2", np.array([[7, 5]] * 4), ids, logits).startswith("topk_ids#2: 50.0 % are")
    assert _compare_classes("argmax", np.zeros(0, np.int32), ids[:0], logits[:0]) == ""


def test_classes_of_other_positions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = live_says(monkeypatch, "topk_ids#16", lambda ids: np.roll(ids, 1, axis=0))
    bad = recompute(made / "cache", "teachers/T", str(made / "teacher"), 2).bad
    assert {one.reason.split(": ")[1] for one in bad} == {"argmax"}


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    other = small_cache.llama(tmp_path / "other", seed=1)
    with pytest.raises(Mismatch, match=r"weights\.model\.safetensors"):
        recompute(small_cache.made() / "cache", "teachers/T", str(other), 1)


def test_status_counts_what_is_damaged_or_left(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "documents/commits/00001.json").write_bytes(b"{")
    (cache / "documents/.tmp-1-aa").write_bytes(b"")
    state = next(state for state in table_states(cache) if state["table"] == "documents")
    assert (state["done"], state["unreadable"], state["leftovers"]) == (2, 1, 1)


def test_no_other_module_of_the_pipeline_writes_files() -> None:
    folder = Path(__file__).parents[3] / "pipeline" / "xkd_pipeline"
    calls = (".write_bytes(", ".write_text(", "os.rename", "os.replace", "os.link", "os.fsync", ".rename(", ".unlink(")
    paths = [path for path in folder.rglob("*.py") if path.name != "export_parquet.py"]  # no cache being made
    assert [(path.name, call) for path in paths for call in calls if call in path.read_text()] == []


def test_a_copy_with_a_copiers_own_files_beside_the_tables_is_whole(tmp_path: Path) -> None:
    copy = small_cache.copied(tmp_path)
    for lock in copy.rglob("LOCK"):
        lock.unlink()
    (copy / ".cache/huggingface").mkdir(parents=True)
    for name in (".cache/huggingface/CACHEDIR.TAG", ".gitattributes"):
        (copy / name).write_text("x")

    assert verify(copy) == []


BITS, SOME_INF = np.full((2, 3), 0x3F80, np.uint16), np.array([0, 0, 0x4000], np.uint16)
WEIGHTS = np.full(4, 0.25, np.float32)
COSINES = np.array([1.0, -1.0, 0.5], np.float16)


@pytest.mark.parametrize(
    ("column", "codec", "fine", "bad", "said"),
    [
        *(("hidden_last", codec, BITS, BITS + SOME_INF, "is not finite") for codec in ("bf16", "bf16-planes", "int8")),
        ("attention@2", "float32", WEIGHTS, np.array([1.5, -0.5], np.float32), "is negative"),
        ("centrality@3", "float32", WEIGHTS, WEIGHTS * 2, "adds up to 2.0000"),
        ("entropy", "float32", WEIGHTS * 2, np.array([0.5, np.inf]), "is not finite"),
        ("span_geometry@2", "float16", COSINES, np.nextafter(COSINES, np.float16(2)), "has a cosine outside [-1, 1]"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_found_under_every_codec(
    column: str, codec: str, fine: Any, bad: Any, said: str
) -> None:
    assert _check_values(column, fine, codec) == ""
    assert _check_values(column, bad, codec) == f"{column} {said}"
