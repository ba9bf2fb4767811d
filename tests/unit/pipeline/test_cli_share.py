"""report and export as commands: what they print, and what they leave; publish and fetch are withdrawn."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from small_cache import made
from xkd_pipeline.cli.app import app
from xkd_schemas.errors import UsageError


def test_report_says_where_it_is(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    done = CliRunner().invoke(app, ["report", str(made() / "cache"), "--out", str(page)])

    assert done.exit_code == 0, done.output
    assert done.output == f"report: {page}, 3 tables; teacher T, student S\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_export_prints_one_object_with_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(made() / "cache"), "--parquet", str(tmp_path / "parquet"), "--json"])

    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["tables"] == 3
    assert len(list((tmp_path / "parquet").rglob("*.parquet"))) == 9


@pytest.mark.parametrize(
    "command", [["publish", "cache/", "s3://b/c", "--json"], ["fetch", "s3://b/c", "cache/"], ["fetch"]]
)
def test_a_withdrawn_command_names_the_copiers_and_is_not_listed(command: list[str]) -> None:
    done = CliRunner().invoke(app, command)

    assert isinstance(done.exception, UsageError)
    assert f"xkd-cache {command[0]} is withdrawn" in str(done.exception)
    assert "docs/sharing.md" in str(done.exception)
    assert f" {command[0]} " not in CliRunner().invoke(app, ["--help"]).output
