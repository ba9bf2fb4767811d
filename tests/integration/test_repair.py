"""repair makes the bad shards again from what it is given, or says what to type; a whole cache is left alone."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import small_cache
from damages import flip
from fake_hardware import hardware_is
from small_cache import IN_PROCESS, files_of, whole_run
from xkd_pipeline.capture.stage import add_signals
from xkd_pipeline.cli.app import app
from xkd_pipeline.maintain.repair import Repaired, repair
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_schemas.cache.manifest import Plan, read_record, to_json
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import Mismatch, UsageError
from xkd_schemas.signals import Signal

PARSER = {"spacy_model": small_cache.SPACY}


def shard(cache: Path, table: str, unit: int) -> Path:
    return next((cache / table).glob(f"{unit:05d}-*.arrow"))


def change_plan(path: Path) -> None:
    """As whoever knows how to write one; before plans had digests, as a flipped bit."""
    plan = read_record(path, Plan)
    path.write_bytes(to_json(plan.model_copy(update={"spec": {**plan.spec, "threads": 7}})))


DAMAGES: dict[str, tuple[Callable[[Path], object], dict[str, int]]] = {
    "all three": (
        lambda c: [shard(c, t, 1).unlink() for t in ("documents", "teachers/T", "students/S")],
        {"documents": 1, "teachers/T": 1, "students/S": 1},
    ),
    "the head": (lambda c: flip(c / "teachers/T/head.safetensors"), {"teachers/T": 0}),
    "the plan of the documents": (lambda c: (c / "documents/plan.json").unlink(), {"documents": 0}),
    "a bit of the plan of a teacher": (lambda c: flip(c / "teachers/T/plan.json"), {"teachers/T": 0}),
    "the plan of a teacher, changed": (lambda c: change_plan(c / "teachers/T/plan.json"), {"teachers/T": 0}),
    "the manifest of the documents": (lambda c: (c / "documents/manifest.json").unlink(), {"documents": 0}),
}


def repaired(cache: Path) -> Repaired:
    """With all that the cache was made from."""
    made = small_cache.made()
    corpus, models = [str(made / "corpus.jsonl")], [str(made / "teacher")]
    return repair(cache, IN_PROCESS, corpus=corpus, models=models, parser=PARSER)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_bad_is_made_again_and_nothing_else(tmp_path: Path, damage: str) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    change, made = DAMAGES[damage]
    change(cache)

    done = repaired(cache)

    assert (done.made, done.commands, done.left) == (made, [], [])
    assert files_of(cache) == before


def test_the_printed_commands_work_when_their_capitals_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    DAMAGES["all three"][0](cache)
    made = small_cache.made()

    printed = []
    for _ in range(3):
        commands = repair(cache, IN_PROCESS).commands
        printed += commands
        for command in commands[:1]:
            typed = command.replace("PATH_OF/corpus.jsonl", str(made / "corpus.jsonl"))
            words = shlex.split(typed.replace("PATH_OF_T", str(made / "teacher")))
            app([*words[1:], "--json", "--spacy-model", small_cache.SPACY], standalone_mode=False)
    capsys.readouterr()

    assert any("--corpus" in command for command in printed)
    assert any("--model" in command for command in printed)
    assert repair(cache, IN_PROCESS).bad == []
    assert files_of(cache) == before


def test_a_lost_plan_of_the_documents_asks_for_the_whole_corpus(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    (cache / "documents/plan.json").write_bytes(b"")
    before = files_of(cache)

    done = repair(cache, IN_PROCESS)

    assert done.commands == [f"xkd-cache repair {cache} --corpus PATH_OF/corpus.jsonl"]
    assert done.left
    assert files_of(cache) == before


def test_a_corpus_a_teacher_or_a_parser_that_is_another_is_refused(tmp_path: Path) -> None:
    cache, corpus = small_cache.copied(tmp_path), [str(small_cache.made() / "corpus.jsonl")]
    flip(shard(cache, "documents", 0))
    other = small_cache.write_rows(tmp_path / "other.jsonl", small_cache.corpus_rows(3))

    with pytest.raises(UsageError, match=r"other.jsonl: not what the documents were made from"):
        repair(cache, IN_PROCESS, corpus=[str(other)], parser=PARSER)
    with pytest.raises(UsageError, match=r"none of the teachers of .*model.safetensors"):
        repair(cache, IN_PROCESS, models=[str(small_cache.llama(tmp_path / "llama", seed=9))])
    with pytest.raises(Mismatch, match=r"parser.max_words: cache has 12, this run has 3"):
        repair(cache, IN_PROCESS, corpus=corpus, parser=PARSER | {"max_words": 3})


def test_a_student_is_made_again_when_its_teacher_is_whole(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    shutil.rmtree(cache / "students/S/commits")
    plan = json.loads((cache / "students/S/plan.json").read_text())
    (cache / "students/S/plan.json").write_text(json.dumps(plan)[:-1])

    assert repair(cache, IN_PROCESS).left == []
    assert files_of(cache) == before


def test_a_damaged_tokenizer_of_a_student_is_written_again_by_the_command(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    flip(cache / "students/S/tokenizer/tokenizer.json")
    (command,) = repair(cache, IN_PROCESS).commands
    typed = shlex.split(command, comments=True)
    given = {"PATH_OF_ITS_TOKENIZER": str(small_cache.made() / "student")}
    app([given.get(word, word) for word in typed[1:]], standalone_mode=False)
    assert files_of(cache) == before


def test_tables_are_repaired_and_added_to_in_their_own_dtype_with_one_warning_where_that_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, model = small_cache.copied(tmp_path), str(small_cache.llama(tmp_path / "llama", hidden_size=8))
    hardware_is(monkeypatch, has_bfloat16=True, factor=0.5)
    teacher = {"name": "half", "model": model, "losses": [], "dtype": "auto"}
    teacher_stage(small_cache.run_file(cache, teacher=teacher), IN_PROCESS)
    hardware_is(monkeypatch, has_bfloat16=False, factor=63.4)
    add_signals(cache, "half", model, lambda _layers: [Signal("entropy")], {}, IN_PROCESS)
    tables = ("teachers/half", "signals/half.1")
    for table in tables:
        shard(cache, table, 1).unlink()

    assert repair(cache, IN_PROCESS, models=[model]).made == dict.fromkeys(tables, 1)

    assert [Table(cache, table).manifest.spec["dtype"] for table in tables] == ["bfloat16", "bfloat16"]
    assert capsys.readouterr().err.count("warning: bfloat16 products take 63 times") == 1


def test_a_cache_that_is_whole_is_not_written_to(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"}

    made = [
        stage(whole_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage, align_stage)
    ]

    assert made == [0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "LOCK"} == before


@pytest.mark.parametrize("part", ["manifest.json", "commits/00001.json"])
def test_a_damaged_record_of_one_table_does_not_stop_the_command_that_makes_another(tmp_path: Path, part: str) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    (cache / "teachers" / "T" / part).write_bytes(b"{")

    again = [stage(whole_run(cache), IN_PROCESS).values["made"] for stage in (documents_stage, teacher_stage)]

    assert again == [0, 0 if part == "manifest.json" else 1]
    assert files_of(cache) == before
