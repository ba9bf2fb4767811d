"""report, export, publish and fetch as commands: what they print, and what they leave."""

import json
from pathlib import Path

from typer.testing import CliRunner

from small_cache import files_of, made
from xkd_pipeline.cli import app
from xkd_schemas.errors import UsageError


def test_report_says_where_it_is(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    done = CliRunner().invoke(app, ["report", str(made() / "cache"), "--out", str(page)])

    assert done.exit_code == 0, done.output
    assert done.output == f"report: {page}, 3 tables; teacher T, student S\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_export_publish_and_fetch_print_one_object_with_json(tmp_path: Path) -> None:
    cache, address = str(made() / "cache"), (tmp_path / "there").as_uri()
    commands = {
        "export": ["export", cache, "--parquet", str(tmp_path / "parquet")],
        "publish": ["publish", cache, address],
        "fetch": ["fetch", address, str(tmp_path / "back")],
    }
    results = {}
    for name, command in commands.items():
        done = CliRunner().invoke(app, [*command, "--json"])
        assert done.exit_code == 0, done.output
        results[name] = json.loads(done.output)

    assert results["export"]["tables"] == 3
    assert results["publish"]["bytes"] == results["fetch"]["bytes"]
    assert files_of(tmp_path / "back") == files_of(made() / "cache")
    assert len(list((tmp_path / "parquet").rglob("*.parquet"))) == 9


def test_a_path_is_no_address(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["publish", str(made() / "cache"), str(tmp_path / "x")])

    assert isinstance(done.exception, UsageError)
    assert "is not an address" in str(done.exception)
