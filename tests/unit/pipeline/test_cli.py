"""xkd-cache as typed: what it prints, its one-line errors and exit codes, and Ctrl-C."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import typer

import small_cache
from forked import begun, wait_for
from small_cache import SPACY, corpus_rows, made, write_rows
from xkd_pipeline.cli import app as cli
from xkd_schemas.cache.table import Table

Said = tuple[int, str, str]
Cache = Callable[..., Said]


@pytest.fixture
def xkd_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    """Run `xkd-cache ARGUMENTS` in this process, without a hub: (exit code, standard output, standard error)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def typed(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["xkd-cache", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (int(code or 0), *capsys.readouterr())

    return typed


def refused(said: Said, code: int, *parts: str) -> None:
    """One line on standard error that has these parts, and this exit code."""
    found, out, err = said
    assert (found, out.count("Traceback"), err.count("\n")) == (code, 0, 1), err
    for part in parts:
        assert part in err
    assert "Next: " in err


def commands() -> list[str]:
    return sorted(name for name, made in typer.main.get_command(cli.app).commands.items() if not made.hidden)


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_with_an_example_of_itself(xkd_cache: Cache, command: str) -> None:
    code, out, err = xkd_cache(command, "--help")

    assert code == 0, err  # a slow machine tells its progress
    assert f"Example: xkd-cache {command} " in " ".join(out.split())
    assert f"xkd-cache {command} " in out.splitlines()[0]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", corpus_rows(6))


def test_the_three_commands_make_the_tables_and_say_so_in_lines_or_in_one_object(
    xkd_cache: Cache, corpus: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    flags = ["--for", "sra,dwa", "--name", "A", "--dtype", "fp32", "--max-tokens", 99, "--template", "none"]
    typed = [
        ("documents", corpus, "--out", cache, "--spacy-model", SPACY),
        ("teacher", cache, "--model", made() / "teacher", *flags),
        ("align", cache, "--student", made() / "student", "--name", "B", "--template", "alpaca"),
    ]
    said = [xkd_cache(*command) for command in typed]
    objects = [xkd_cache(*command, "--json") for command in (*typed, ("status", cache))]

    assert [code for code, *_ in (*said, *objects)] == [0] * 7
    assert [out.count("\n") for _, out, _ in objects] == [1] * 4
    (form, size, result), taught, (aligned,) = (out.splitlines() for _, out, _ in said)
    assert size.startswith("shards of ")
    assert form == f"{corpus}: 6 rows, prompt and response (prompt, response)"
    assert result.startswith("documents: 6 documents, ")
    assert [line.split(": ")[0] for line in taught] == ["template", "dtype", "teachers/A"]
    assert aligned.startswith("students/B: ")

    spec = Table(cache, "teachers/A").manifest.spec
    assert (spec["dtype"], spec["encoder"]["max_tokens"], spec["encoder"]["template"]) == ("float32", 99, "none")
    assert "span_mass" not in str(spec["signals"])
    assert Table(cache, "students/B").manifest.constants["template"] == "alpaca"

    documents, teacher, align, status = (json.loads(out) for _, out, _ in objects)
    assert documents["sources"] == [form]
    assert (documents["table"], documents["documents"]) == ("documents", 6)
    assert teacher["root"] == Table(cache, "teachers/A").manifest.root
    assert align["spans"] > align["exact_pairs"] > 0
    assert [table["table"] for table in status["tables"]] == ["documents", "teachers/A", "students/B"]
    assert all(table["sealed"] and table["done"] == table["units"] for table in status["tables"])


@pytest.mark.parametrize("column", ["prompt", "prompt=", "=frage"])
def test_a_column_that_is_no_pair_is_refused(xkd_cache: Cache, corpus: Path, tmp_path: Path, column: str) -> None:
    said = xkd_cache("documents", corpus, "--out", tmp_path / "cache", "--column", column)

    refused(said, 2, f"--column {column}: expected KEY=VALUE")
    assert not (tmp_path / "cache").exists()


def test_a_path_may_hold_any_character(xkd_cache: Cache, tmp_path: Path) -> None:
    names = ("a \"b\" \\ 'c'.jsonl", "é 🙂.jsonl", "tab\tnew\nline\x7f.jsonl", "a=b,[c].jsonl")
    rows = [write_rows(tmp_path / name, corpus_rows(1)) for name in names]

    code, _, err = xkd_cache("documents", *rows, "--out", tmp_path / "cache", "--spacy-model", SPACY)

    assert code == 0, err  # a slow machine tells its progress
    assert [row["source"] for row in Table(tmp_path / "cache", "documents")] == list(names)


def run_toml(folder: Path, corpus: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'cache = "{folder / "cache"}"\n[documents]\ncorpus = ["{corpus}"]\nspacy_model = "{SPACY}"\n'
        f'[teacher]\nmodel = "{made() / "teacher"}"\ndtype = "float32"\n'
        f'[student]\ntokenizer = "{made() / "student"}"\n'
    )
    return path


def test_preprocess_runs_the_three_stages_of_a_run_file_and_reuses_them(
    xkd_cache: Cache, corpus: Path, tmp_path: Path
) -> None:
    run = run_toml(tmp_path, corpus)

    code, out, _ = xkd_cache("preprocess", run)
    assert code == 0
    names = ["documents", "template", "dtype", "teachers/teacher", "students/student"]
    assert [line.split(":")[0] for line in out.splitlines()[2:]] == names
    before = small_cache.files_of(tmp_path / "cache")

    code, out, _ = xkd_cache("preprocess", run, "--json")
    assert code == 0
    assert [stage["made"] for stage in json.loads(out)["stages"]] == [0, 0, 0]
    assert small_cache.files_of(tmp_path / "cache") == before


@pytest.mark.parametrize("line", ["gpus_per_worker = 1.0", 'ray_address = "head:6379"', "stall_timeout = 9"])
def test_settings_of_workers_need_workers(xkd_cache: Cache, corpus: Path, tmp_path: Path, line: str) -> None:
    run = run_toml(tmp_path, corpus)
    run.write_text(f"{line}\n{run.read_text()}")

    refused(xkd_cache("preprocess", run), 2, "need Ray workers, found --workers 0", "add --workers N")
    assert not (tmp_path / "cache").exists()


def test_a_flag_with_two_faces_takes_no_value(xkd_cache: Cache, corpus: Path, tmp_path: Path) -> None:
    words = ("documents", corpus, "--out", tmp_path / "cache", "--spacy-model", SPACY, "--no-drop-contained")
    assert xkd_cache(*words)[0] == 0
    assert Table(tmp_path / "cache", "documents").manifest.spec["parser"]["drop_contained"] == "False"


def test_status_says_how_far_each_table_is(xkd_cache: Cache, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "teachers" / "T" / "manifest.json").unlink()
    (cache / "teachers" / "T" / "commits" / "00002.json").unlink()

    code, out, _ = xkd_cache("status", cache)

    assert code == 0
    assert "documents: finished, 12 documents, " in out
    assert "teachers/T: 2 of 3 shards done, 8 documents, " in out


def test_of_several_students_or_teachers_show_asks_for_one(xkd_cache: Cache, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    assert xkd_cache("align", cache, "--student", made() / "teacher", "--name", "S2")[0] == 0
    refused(xkd_cache("show", cache, 0), 2, "has students S, S2", "--student NAME")
    out = xkd_cache("show", cache, 0, "--student", "S2", "--width", 60)[1]
    assert out.startswith("teacher T, student S2\n")
    assert max(len(line) for line in out.splitlines()) <= 60

    teacher = ["--model", made() / "teacher", "--name", "T2", "--for", "dwa", "--dtype", "float32"]
    assert xkd_cache("teacher", cache, *teacher)[0] == 0
    refused(xkd_cache("show", cache, 0), 2, "has teachers T, T2", "--teacher NAME")
    assert xkd_cache("show", cache, 0, "--teacher", "T2")[1].startswith("teacher T2, student none\n")


def test_status_and_report_count_every_file_of_a_table_and_of_the_cache(xkd_cache: Cache, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "teachers" / "T" / "head.safetensors").write_bytes(bytes(5_000_000))

    code, out, _ = xkd_cache("status", cache, "--json")
    found = json.loads(out)
    sizes = {path: path.stat().st_size for path in cache.rglob("*") if path.is_file()}

    assert (code, found["bytes"]) == (0, sum(sizes.values()))
    for state in found["tables"]:
        folder = cache / state["table"]
        assert state["bytes"] == sum(size for path, size in sizes.items() if folder in path.parents)
    out = xkd_cache("status", cache)[1]
    assert re.search(r"teachers/T: .*, 5\.\d MB\n", out)
    assert re.search(r"cache: 5\.\d MB\n$", out)
    page = tmp_path / "r.html"
    assert xkd_cache("report", cache, "--out", page)[:2] == (0, f"report: {page}, 3 tables; teacher T, student S\n")
    assert re.search(r"5\.\d MB", page.read_text(encoding="utf-8"))


def test_a_dropped_table_is_gone_and_the_rest_is_whole(xkd_cache: Cache, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = small_cache.files_of(cache)
    said = xkd_cache("drop", cache, "teachers/T")
    refused(said, 2, "students/S was made from", f"xkd-cache drop {cache} students/S")
    for name in ("documents", "students/Q", "students/../documents"):
        refused(xkd_cache("drop", cache, name), 2, "no table", "teachers/T, students/S")
    assert small_cache.files_of(cache) == before

    code, out, _ = xkd_cache("drop", cache, "students/S")

    assert (code, out.startswith("dropped students/S, freed ")) == (0, True)
    assert xkd_cache("verify", cache, "--level", "deep")[0] == 0
    after = small_cache.files_of(cache)
    kept = {name for name in before if not name.startswith("students/")}
    assert set(after) == kept
    assert {name for name in kept if before[name] != after[name]} == {"README.md", "SHA256SUMS"}
    assert xkd_cache("align", cache, "--student", made() / "student", "--name", "S")[0] == 0
    assert small_cache.files_of(cache) == before


def test_a_drop_that_died_goes_on_and_takes_no_damage_for_whole(xkd_cache: Cache, tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "students" / "S" / "manifest.json").unlink()
    card = cache / "teachers" / "T" / "tokenizer" / "tokenizer_config.json"
    card.write_bytes(card.read_bytes() + b" ")

    assert xkd_cache("drop", cache, "students/S")[0] == 0

    code, out, _ = xkd_cache("verify", cache)
    assert code == 65
    assert set(out.splitlines()) == {
        "teachers/T/tokenizer/tokenizer_config.json: does not match its sha256",
        "teachers/T/tokenizer/tokenizer_config.json: does not match SHA256SUMS",
    }


def test_an_export_is_done_when_it_is_typed_again(xkd_cache: Cache, tmp_path: Path) -> None:
    command = ("export", made() / "cache", "--parquet", tmp_path / "parquet")
    code, out, _ = xkd_cache(*command, "--json")
    before = small_cache.files_of(tmp_path)

    assert (code, json.loads(out)["tables"], len(list((tmp_path / "parquet").rglob("*.parquet")))) == (0, 3, 9)
    assert xkd_cache(*command)[0] == 0
    assert small_cache.files_of(tmp_path) == before

    next((tmp_path / "parquet").rglob("*.parquet")).write_bytes(b"another")
    refused(xkd_cache(*command), 2, "exists and is not empty")


@pytest.mark.parametrize("command", [["publish", "cache/", "s3://b/c", "--json"], ["fetch"]])
def test_a_withdrawn_command_names_the_copiers_and_is_not_listed(xkd_cache: Cache, command: list[str]) -> None:
    refused(xkd_cache(*command), 2, f"xkd-cache {command[0]} is withdrawn", "docs/sharing.md")
    assert f" {command[0]} " not in xkd_cache("--help")[1]


BAD_DOCUMENTS = {
    "a wrong path": (["nope.jsonl"], 66, ["nope.jsonl: No such file or directory", "check the path"]),
    "a data set that no hub gives": (["no/such-data"], 66, ["no/such-data", "check the path"]),
    "no row": (["empty.jsonl", "--form", "text"], 65, ["the corpus has no rows"]),
    "an unknown form": (["rows.jsonl", "--form", "csv"], 2, ["form 'csv' is not known"]),
    "an unknown field": (["rows.jsonl", "--column", "promt=prompt"], 2, ["promt", "prompt"]),
    "an unknown parser": (["rows.jsonl", "--parser", "stanza"], 2, ["'stanza' is not a parser", "spacy or benepar"]),
    "a cache that is a file": (["rows.jsonl", "--out", "empty.jsonl"], 2, ["empty.jsonl is a file"]),
    "lists for texts": (["lists.jsonl"], 65, ['row 1, field "instruction" is a list, not a string', "--column"]),
}


@pytest.fixture
def odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", corpus_rows(2))
    write_rows(tmp_path / "lists.jsonl", [{"instruction": ["Say hi."], "output": "Hi."}] * 3)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("bad", BAD_DOCUMENTS)
def test_bad_input_of_documents_is_one_line(xkd_cache: Cache, odd_files: Path, bad: str) -> None:
    arguments, code, parts = BAD_DOCUMENTS[bad]
    refused(xkd_cache("documents", *arguments, "--spacy-model", SPACY), code, *parts)


def test_other_bad_input_of_teacher_is_one_line(xkd_cache: Cache, odd_files: Path) -> None:
    model = ["--model", made() / "teacher"]
    cache = made() / "cache"

    for unknown, *parts in (
        ("no-such-model-anywhere", "model no-such-model-anywhere", "give a folder"), ("missing.gguf", "missing.gguf"),
        ("/no/such/folder", "/no/such/folder"), ("folder", "model folder: the folder has no config.json"),
    ):  # fmt: skip
        refused(xkd_cache("teacher", cache, "--model", unknown, "--name", "X"), 66, *parts)
    missing = ("cache nowhere is not a folder", "Next: xkd-cache documents CORPUS --out nowhere")
    for command in (("teacher", "nowhere", *model), ("align", "nowhere", "--student", "x"), ("add", "nowhere")):
        refused(xkd_cache(*command), 66, *missing)
    assert not Path("nowhere").exists()
    Path("begun").mkdir()
    refused(xkd_cache("teacher", "begun", *model), 66, "Next: xkd-cache documents CORPUS --out begun")
    refused(xkd_cache("teacher", cache, *model, "--for", "mta,sar"), 2, "'sar' is not a loss", "sra")
    refused(xkd_cache("teacher", cache, *model, "--set", "losses.mat.hid=off"), 2, "'mat' is not a loss", "mta")
    refused(xkd_cache("teacher", cache, *model, "--for", "sra", "--set", "losses.mta.hdi=off"), 2, "mean 'hid'?")
    evil = (2, "--name ../T: not a name for a table", "use letters")
    refused(xkd_cache("teacher", cache, *model, "--name", "../T"), *evil)
    refused(xkd_cache("align", cache, "--student", made() / "student", "--name", "../T"), *evil)


def test_bad_input_of_align_show_and_status_is_one_line(xkd_cache: Cache, odd_files: Path) -> None:
    cache = made() / "cache"

    refused(xkd_cache("align", cache, "--student", "./no-student"), 66, "no-student")
    refused(xkd_cache("align", cache, "--student", made() / "student", "--teacher", "Q"), 66, "teachers/Q")
    refused(xkd_cache("show", cache, "zzz"), 66, "no document 'zzz' among 12")
    refused(xkd_cache("show", cache, 0, "--student", "Q"), 66, "students/Q")
    refused(xkd_cache("show", "nowhere", 0), 66, "nowhere is not a folder", "xkd-cache documents")
    refused(xkd_cache("status", "nowhere"), 66, "nowhere is not a folder", "xkd-cache documents")


SLOW = """
import sys, time
from xkd_pipeline.cli.app import main
from xkd_pipeline.tables.writer import Store
commit = Store.commit
def slowly(self, record):
    commit(self, record)
    time.sleep(0.25)
Store.commit = slowly
sys.argv[0] = "xkd-cache"
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
main()
"""
"""xkd-cache that takes a breath behind every shard, so that a signal finds it at work."""


def test_ctrl_c_keeps_every_finished_shard_and_the_same_command_goes_on_to_the_same_bytes(
    xkd_cache: Cache, tmp_path: Path
) -> None:
    corpus, cache = write_rows(tmp_path / "rows.jsonl", corpus_rows(8)), tmp_path / "cache"
    units = ["--set", "documents.rows_per_shard=1", "--spacy-model", SPACY]
    assert xkd_cache("documents", corpus, "--out", cache, *units)[0] == 0
    shutil.copytree(cache, tmp_path / "undisturbed")
    flags = ["--model", made() / "teacher", "--name", "T", "--dtype", "float32"]

    process, commits = begun(SLOW, tmp_path / "said", "teacher", cache, *flags), cache / "teachers" / "T" / "commits"
    deadline = time.monotonic() + 60
    while len(list(commits.glob("[0-9]*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    ((code, out, err),) = wait_for([process], [tmp_path / "said"], seconds=60)

    assert code == 130, err
    assert "Traceback" not in out + err
    kept = r"xkd-cache: interrupted. Kept: [1-7] of 8 shards of teachers/T \([1-7] documents\); lost: what was done .*"
    assert re.fullmatch(kept + "Next: run the same command again to go on", err.splitlines()[-1])
    shards = {p.name: p.read_bytes() for p in (cache / "teachers" / "T" / "commits").iterdir()}
    assert 2 <= len(shards) < 8
    assert not (cache / "teachers" / "T" / "manifest.json").exists()

    code, out, _ = xkd_cache("teacher", cache, *flags, "--json")
    assert code == 0
    assert (json.loads(out)["reused"], json.loads(out)["made"]) == (len(shards), 8 - len(shards))
    assert xkd_cache("teacher", tmp_path / "undisturbed", *flags)[0] == 0
    assert small_cache.files_of(cache) == small_cache.files_of(tmp_path / "undisturbed")
