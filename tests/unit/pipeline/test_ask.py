"""A server is asked for log-probabilities: what it does wrong is waited for, asked again, or refused, and nothing is
asked twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import log_probability_server as local
import small_cache
from small_cache import asked, made, refused
from xkd_pipeline.served import ask as module
from xkd_schemas.cache.table import Table

Row = dict[str, Any]
KEY = "sk-do-not-tell"


@pytest.fixture(scope="module")
@torch.no_grad()
def answers() -> list[Row]:
    """Ids and log-probabilities of each document of the small cache; made-up numbers do."""
    rows = Table(made() / "cache", "teachers/T")
    return [
        {"doc_id": r["doc_id"], "token_ids": r["token_ids"].tolist(),
         "logprobs": [None, *(-0.125 * (t % 7) for t in r["token_ids"][1:].tolist())]}
        for r in rows
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("XKD_API_KEY", KEY)


def typed(url: str, out: Path, *more: object) -> tuple[object, ...]:
    words = ("ask", url, made() / "cache", "--tokenizer", made() / "teacher", "--template", "chat", "--out", out)
    return (*words, *more)


def lines(out: Path) -> dict[str, Row]:
    return {row["doc_id"]: row for row in map(json.loads, out.read_text().splitlines())}


@pytest.mark.parametrize("style", ["--no-echo", "--echo"])
def test_what_a_server_answers_is_what_import_reads(answers: list[Row], style: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with local.served(answers) as (url, prompts):
        code, said = asked(*typed(url, out, style))

    assert (code, said["answered"], said["refused"]) == (0, 12, {})
    assert lines(out) == {row["doc_id"]: row for row in answers}
    assert set(prompts.asked.values()) == {1}
    assert prompts.headers[0]["Authorization"] == f"Bearer {KEY}"
    cache = small_cache.copied(tmp_path)
    flags = ("--tokenizer", made() / "teacher", "--template", "chat", "--name", "V")
    assert asked("import", cache, out, *flags)[1]["refused"] == {}


def test_a_server_that_stalls_drops_cuts_or_is_busy_is_asked_again(answers: list[Row], tmp_path: Path) -> None:
    with local.served(answers, {1: "stall", 2: "drop", 3: "half", 4: "busy"}) as (url, prompts):
        code, said = asked(*typed(url, tmp_path / "a.jsonl", "--requests", 3))

    assert (code, said["answered"]) == (0, 12)
    assert lines(tmp_path / "a.jsonl") == {row["doc_id"]: row for row in answers}
    assert dict(prompts.asked) == {at: 2 if at in (1, 2, 3, 4) else 1 for at in range(12)}
    assert 2 <= prompts.most <= 3


def test_after_429_nothing_is_asked_before_the_time_that_the_server_names(answers: list[Row], tmp_path: Path) -> None:
    with local.served(answers, {0: "busy"}) as (url, prompts):
        assert asked(*typed(url, tmp_path / "a.jsonl", "--requests", 1))[0] == 0

    assert prompts.times[1] - prompts.times[0] >= 0.99


def test_what_the_server_lies_about_or_refuses_is_told_and_not_written(answers: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with local.served(answers, {5: "lie", 6: "no value", 7: "too long"}) as (url, prompts):
        code, said = asked(*typed(url, out, "--max-reject", 0.5))
        assert code == 0
        assert set(said["refused"]) == {answers[at]["doc_id"] for at in (5, 6, 7)}
        assert "missing or not finite" in said["refused"][answers[6]["doc_id"]]
        assert "is rated there" in said["refused"][answers[5]["doc_id"]]
        assert said["refused"][answers[7]["doc_id"]] == 'the server says 400 {"error": "maximum length; Bearer ***"}'
        assert len(lines(out)) == 9
        line = refused(*typed(url, out))
        assert "documents are refused, more than --max-reject 0.01" in line
        assert KEY not in line
    assert max(prompts.asked.values()) == 2
    assert KEY not in out.read_text()


def test_a_second_run_asks_for_the_rest_and_drops_a_line_that_was_cut(answers: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    whole = [json.dumps(row) for row in answers[:5]]
    out.write_text("\n".join(whole) + "\n" + whole[0][:40])
    with local.served(answers) as (url, prompts):
        code, said = asked(*typed(url, out))

    assert (code, said["answered"], said["there"]) == (0, 7, 5)
    assert sorted(prompts.asked) == [5, 6, 7, 8, 9, 10, 11]
    assert lines(out) == {row["doc_id"]: row for row in answers}


def test_a_server_that_is_gone_ends_in_one_line_and_loses_nothing(answers: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with local.served(answers, {11: "stall"}) as (url, _):
        first = refused(*typed(url, out, "--served-model", "big", "--requests", 1, "--retries", 0))
    second = refused(*typed(url, out, "--retries", 2))

    assert "no answer: ReadTimeout" in first
    assert f"{url}: no answer: ConnectError" in second
    assert "run the same command again" in second
    assert len(lines(out)) == 11


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://me:secret@host/v1", "ftp://host", "http://host/v1?key=secret"]
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_it(url: str, tmp_path: Path) -> None:
    line = refused(*typed(url, tmp_path / "a.jsonl"))

    assert "is not http://HOST:PORT/v1" in line
    assert "secret" not in line


def test_two_commands_do_not_write_to_one_file(tmp_path: Path) -> None:
    with module.open_answers(tmp_path / "a.jsonl"):
        assert "is being written" in refused(*typed("http://127.0.0.1:1/v1", tmp_path / "a.jsonl"))


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("notes\n")

    assert "no answer of a server" in refused(*typed("http://127.0.0.1:1/v1", tmp_path / "a.jsonl"))
    assert (tmp_path / "a.jsonl").read_text() == "notes\n"


def test_no_redirect_is_followed_with_the_key(answers: list[Row], tmp_path: Path) -> None:
    with local.served(answers, {0: "moved"}) as (url, _):
        assert "no answer: 307" in refused(*typed(url, tmp_path / "a.jsonl"))


def test_prompts_are_written_for_programs_that_run_without_a_server(answers: list[Row], tmp_path: Path) -> None:
    code, said = asked(*typed("-", tmp_path / "prompts.jsonl"))

    assert (code, said["prompts"]) == (0, 12)
    written = list(lines(tmp_path / "prompts.jsonl").values())
    assert written == [{name: row[name] for name in ("doc_id", "token_ids")} for row in answers]
