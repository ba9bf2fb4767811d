"""A cache that was added to: the old bytes as they were, the union trained on, every command at home in it."""

import functools
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_cache
from forked import in_a_copy
from small_cache import IN_PROCESS, corpus_rows, files_of, run_file, write_rows
from xkd_pipeline.add import Added, More, again, take_in
from xkd_pipeline.capture import capture
from xkd_pipeline.clear import collect
from xkd_pipeline.corpus import open_source
from xkd_pipeline.mend import Means, repair
from xkd_pipeline.parquet import export_parquet
from xkd_pipeline.progress import table_states
from xkd_pipeline.recompute import Recomputed, recompute
from xkd_pipeline.report_page import write_report
from xkd_pipeline.signals_table import add_signals
from xkd_pipeline.spans import ParserSettings
from xkd_pipeline.stages import align_stage, documents_stage, teacher_stage
from xkd_pipeline.verify import verify
from xkd_schemas import faults
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_schemas.table import Table
from xkd_schemas.teacher import Signal, signal_named
from xkd_trainer.cache import Cache
from xkd_trainer.loop import train
from xkd_trainer.order import Order
from xkd_trainer.stream import batch_of

TABLES = ("documents", "teachers/T", "students/S")
MORE = More(parser=ParserSettings(model=small_cache.SPACY))
SEED = int(os.environ.get("XKD_FAULT_SEED", "20261124"))
ROUNDS = int(os.environ.get("XKD_FAULT_ROUNDS", "12"))


def teacher() -> Path:
    return small_cache.made() / "teacher"


@functools.cache
def more_rows(count: int = 7, first: int = 100) -> Path:
    rows = [row | {"prompt": f"{first + n}. {row['prompt']}"} for n, row in enumerate(corpus_rows(count))]
    return write_rows(small_cache.made() / f"more{first}.jsonl", rows)


def grown(cache: Path, corpus: Path | None, *models: Path) -> Added:
    sources = [open_source(str(corpus), columns={})] if corpus else []
    return take_in(cache, sources, MORE, [str(model) for model in models], IN_PROCESS, lambda _line: None)


@functools.cache
def union() -> Path:
    """The small cache with 7 documents added."""
    cache = Path(shutil.copytree(small_cache.made() / "cache", small_cache.made() / "union"))
    grown(cache, more_rows(), teacher())
    return cache


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(union(), tmp_path / "union"))


def run_of(cache: Path, out: Path, **train_values: object) -> "small_cache.RunFile":
    student = {"model": "new:llama,layers=2,width=16,heads=2", "tokenizer": str(small_cache.made() / "student")}
    values = {"out": str(out), "loss": "mta+sra+dwa", "epochs": 1, "batch_size": 4, "threads": 1}
    return run_file(cache, student=student, train=values | train_values)


def test_the_old_bytes_are_as_they_were_and_the_whole_is_whole() -> None:
    before, after = files_of(small_cache.made() / "cache"), files_of(union())

    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"README.md", "SHA256SUMS", *(f"{table}/manifest.json" for table in TABLES)}
    assert [len(Table(union(), table)) for table in TABLES] == [19, 19, 19]
    assert verify(union(), "deep") == []
    check = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=union(), capture_output=True, check=False
    )
    assert check.returncode == 0
    assert collect(union(), older_than=0.0, dry_run=True) == []


def test_an_added_row_is_what_a_new_cache_would_hold(tmp_path: Path) -> None:
    made = small_cache.made()
    run = run_file(
        tmp_path / "fresh",
        documents={"corpus": [str(more_rows())]},
        teacher={"model": str(teacher())},
        student={"tokenizer": str(made / "student")},
    )
    for stage in (documents_stage, teacher_stage, align_stage):
        stage(run, IN_PROCESS)

    for name in TABLES:
        ours, fresh = Table(union(), name), Table(tmp_path / "fresh", name)
        columns = fresh.shard(0).schema.names
        for row in range(7):
            for column in columns:
                assert np.array_equal(ours[12 + row][column], fresh[row][column]), (name, row, column)


def test_training_takes_the_union_in_the_closed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xkd_trainer import distiller

    seen: list[int] = []
    forward = distiller.Distiller.forward

    def watching(self: distiller.Distiller, batch: "distiller.Batch", *rest: object, **more: object) -> object:
        seen.extend(batch.rows)
        return forward(self, batch, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(distiller.Distiller, "forward", watching)
    trained = train(run_of(union(), tmp_path / "out"), quiet=True)

    order = Order(size=19, batch_size=4, seed=0)
    assert trained.steps == 5
    assert seen == [int(row) for step in range(5) for row in order.step(step)]
    assert sorted(seen) == list(range(19))


def test_datasets_opens_the_union(tmp_path: Path) -> None:
    from datasets import load_dataset

    for name in TABLES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            loaded = load_dataset(str(union()), name.replace("/", "-"), split="train", cache_dir=str(tmp_path))
        assert loaded["doc_id"][:] == [row["doc_id"] for row in Table(union(), name)]


def test_the_other_commands_know_the_union(tmp_path: Path) -> None:
    assert [(s["documents"], s["sealed"], s["additions"]) for s in table_states(union())] == [(19, True, 1)] * 3
    assert export_parquet(union(), tmp_path / "parquet")["tables"] == 3
    assert len(list((tmp_path / "parquet/documents").glob("*.parquet"))) == 5
    assert write_report(union(), tmp_path / "report.html")["tables"] == 3


def test_the_commands_that_made_the_cache_change_nothing_in_the_union(tmp_path: Path) -> None:
    cache, made = copied(tmp_path), small_cache.made()
    run = run_file(
        cache,
        documents={"corpus": [str(made / "corpus.jsonl")]},
        teacher={"model": str(teacher())},
        student={"tokenizer": str(made / "student")},
    )
    for stage in (documents_stage, teacher_stage, align_stage):
        assert stage(run, IN_PROCESS).values["made"] == 0
    assert grown(cache, more_rows(), teacher()).built.keys() == {"documents"}
    assert files_of(cache) == files_of(union())


def test_the_first_command_with_all_the_files_is_the_union_too(tmp_path: Path) -> None:
    cache, made = copied(tmp_path), small_cache.made()
    corpora = {"corpus": [str(made / "corpus.jsonl"), str(more_rows())]}

    assert documents_stage(run_file(cache, documents=corpora), IN_PROCESS).values["made"] == 0
    assert files_of(cache) == files_of(union())


def test_a_command_line_that_asks_for_two_things_or_half_of_one_is_a_usage_error(tmp_path: Path) -> None:
    from xkd_pipeline.cli import app

    for words, message in (
        (["--documents", "more.jsonl", "--for", "dwa"], "one after the other"),
        (["--signals", "entropy"], "read from one teacher"),
        (["--signals", "entropies", "--model", str(teacher())], "signal 'entropies' is not known"),
        (["--for", "dwa", "--model", str(teacher()), "--set", "teacher.topk=0"], "topk"),
    ):
        with pytest.raises(UsageError, match=message):
            app(["add", str(union()), *words], standalone_mode=False)
    with pytest.raises(InputMissing, match=r"is not a folder"):
        app(["add", str(tmp_path / "nothing")], standalone_mode=False)


def test_repair_makes_added_units_from_the_added_file(tmp_path: Path) -> None:
    cache = copied(tmp_path)
    for name in TABLES:
        next((cache / name / "added/1").glob("00003-*.arrow")).unlink()

    assert repair(cache, IN_PROCESS).commands[0] == f"xkd-cache repair {cache} --corpus PATH_OF/{more_rows().name}"
    done = repair(cache, IN_PROCESS, Means(corpus=(str(more_rows()),), models=(str(teacher()),), parser=MORE.parser))

    assert (done.made, done.left) == (dict.fromkeys(TABLES, 1), [])
    assert files_of(cache) == files_of(union())


def test_without_the_teacher_the_command_is_printed_and_the_old_rows_are_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from xkd_pipeline.cli import app

    cache = small_cache.copied(tmp_path)
    flags = ["--spacy-model", small_cache.SPACY]
    app(["add", str(cache), "--documents", str(more_rows()), *flags], standalone_mode=False)
    (typed,) = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("to run")]
    early = Cache(cache, student="S")
    assert (len(early.usable), early.not_used, early.sizes.hidden_std) == (12, 7, old_std())

    app(["add", str(cache), "--documents", str(more_rows(5, 200)), *flags, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["commands"] == [typed]
    app(shlex.split(typed.replace("PATH_OF_T", str(teacher())))[1:], standalone_mode=False)

    assert [len(Table(cache, name)) for name in TABLES] == [24, 24, 24]
    assert [len(Table(cache, name).manifest.starts) for name in TABLES] == [2, 1, 1]
    assert Cache(cache, student="S").not_used == 0
    assert verify(cache, "deep") == []


def test_between_two_tables_of_an_addition_everything_is_as_it_was_before(tmp_path: Path) -> None:
    cache, made = small_cache.copied(tmp_path), small_cache.made()
    grown(cache, more_rows())
    run = run_file(cache, teacher={"model": str(teacher())}, student={"tokenizer": str(made / "student")})
    assert [stage(run, IN_PROCESS).values["made"] for stage in (teacher_stage, align_stage)] == [0, 0]
    before = Cache(made / "cache", student="S")
    wanted = frozenset({Signal("hidden_last"), Signal("entropy")})

    assert again(cache, "teachers/T", str(teacher()), IN_PROCESS, more=True).made == 2

    assert align_stage(run, IN_PROCESS).values["made"] == 0
    between = Cache(cache, student="S")
    assert len(between.teachers) == 19
    assert between.teachers.manifest.constants["hidden_std"] != old_std()
    assert (between.sizes, between.usable.tolist()) == (before.sizes, before.usable.tolist())
    assert between.identity(wanted) == before.identity(wanted)
    ours, theirs = (batch_of(one, [0, 7, 11], wanted) for one in (between, before))
    assert ours.teacher_hidden_BRD is not None
    assert theirs.teacher_hidden_BRD is not None
    assert torch.equal(ours.teacher_hidden_BRD, theirs.teacher_hidden_BRD)


def old_std() -> float:
    return Cache(small_cache.made() / "cache", student="S").sizes.hidden_std


def test_what_cannot_be_added_is_refused_before_anything_is_begun(tmp_path: Path) -> None:
    cache, made = small_cache.copied(tmp_path), small_cache.made()
    before = files_of(cache)
    other = small_cache.llama(tmp_path / "other", seed=5)

    with pytest.raises(UsageError, match=r"corpus.jsonl is in this cache already"):
        grown(cache, made / "corpus.jsonl", teacher())
    with pytest.raises(UsageError, match=r"other is none of the teachers of .*model.safetensors"):
        grown(cache, more_rows(), other)
    with pytest.raises(Mismatch, match=r"parser.max_words: cache has 12, this run has 4"):
        take_in(
            cache, [open_source(str(more_rows()), columns={})],
            More(parser=ParserSettings(model=small_cache.SPACY, max_words=4)), [], IN_PROCESS, lambda _line: None,
        )  # fmt: skip
    assert files_of(cache) == before


def test_a_killed_addition_goes_on_and_the_old_rows_are_readable_throughout(tmp_path: Path) -> None:
    whole = small_cache.copied(tmp_path)
    with faults.injected("*:0:count") as fault:
        grown(whole, more_rows(), teacher())
    count, chance = len(fault.points), random.Random(SEED)
    bounds = np.linspace(1, count, 1 + max(3, ROUNDS // 3)).astype(int)
    for first, end in itertools.pairwise(bounds.tolist()):
        number = chance.randint(first, end)
        cache = Path(shutil.copytree(small_cache.made() / "cache", tmp_path / f"from {first}"))

        def dying(cache: Path = cache, number: int = number) -> None:
            with faults.injected(f"*:{number}:kill"):
                grown(cache, more_rows(), teacher())

        assert os.WIFSIGNALED(status := in_a_copy(dying))
        assert os.WTERMSIG(status) == signal.SIGKILL
        view = Cache(cache, student="S")
        assert len(view.usable) in (12, 19), f"killed at {number} of {count}"
        assert view.students[11]["doc_id"] == view.documents[11]["doc_id"]
        assert view.sizes.hidden_std == old_std() or len(view.usable) == 19
        grown(cache, more_rows(), teacher())
        assert files_of(cache) == files_of(union()), f"killed at {number} of {count}"


def entropy_doubled(*given: Any) -> list[dict[str, Any]]:
    (row,) = capture(*given)
    return [row | {"entropy": 2 * row["entropy"]}]


def test_signals_beside_a_teacher_are_read_as_if_they_had_been_captured_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = small_cache.copied(tmp_path)
    for kind in ("teachers", "students"):
        shutil.rmtree(cache / kind)
    student = {"tokenizer": str(small_cache.made() / "student")}
    run = run_file(cache, teacher={"model": str(teacher()), "losses": ["alm"], "codec": "int8"}, student=student)
    for stage in (teacher_stage, align_stage):
        stage(run, IN_PROCESS)
    before = files_of(cache)
    wanted = [signal_named(c) for c in ("entropy", "hidden_last", "span_vectors@2:word", "span_mass@2:word")]

    built = add_signals(cache, "T", str(teacher()), lambda _layers: wanted, "bf16", IN_PROCESS)

    assert built is not None
    assert built.manifest.spec["signals"] == ["entropy", "span_mass@2:word", "span_vectors@2:word"]
    assert add_signals(cache, "T", str(teacher()), lambda _layers: wanted, "", IN_PROCESS) is None
    after = files_of(cache)
    assert {name for name in before if before[name] != after[name]} == {"README.md", "SHA256SUMS"}
    assert "token_ids" not in Table(cache, "signals/T.1").shard(0).schema.names
    assert recompute(cache, "teachers/T", str(teacher()), 4) == Recomputed(
        bad=[], rows=4, skipped=["hidden_last"], dtype="float32"
    )
    with monkeypatch.context() as patch:
        patch.setattr("xkd_pipeline.recompute.capture", entropy_doubled)
        bad = recompute(cache, "teachers/T", str(teacher()), 1).bad
    assert [(one.table, one.unit) for one in bad] == [("signals/T.1", 0)]
    assert "entropy differs by 1.000" in bad[0].reason
    whole = Table(small_cache.made() / "cache", "teachers/T")
    joined = Cache(cache, student="S")
    for row in range(12):
        for column in ("entropy", "span_vectors@2:word", "span_mass@2:word", "token_ids"):
            assert np.array_equal(joined.teachers[row][column], whole[row][column]), (row, column)
    assert verify(cache, "deep") == []
    assert write_report(cache, tmp_path / "report.html")["tables"] == 4

    grown(cache, more_rows(), teacher())
    assert [len(Table(cache, name)) for name in (*TABLES, "signals/T.1")] == [19] * 4
    assert verify(cache, "deep") == []
    batch = batch_of(Cache(cache, student="S"), [3, 15], frozenset({Signal("entropy"), Signal("hidden_last")}))
    fresh = batch_of(Cache(union(), student="S"), [3, 15], frozenset({Signal("entropy"), Signal("hidden_last")}))
    assert torch.equal(batch.teacher_entropy_BM, fresh.teacher_entropy_BM)


def test_signals_that_end_before_the_students_are_named_with_what_takes_them_on(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    logits = [Signal("topk_ids", top=4), Signal("topk_logits", top=4)]
    add_signals(cache, "T", str(teacher()), lambda _layers: logits, "", IN_PROCESS)
    early = Path(shutil.copytree(cache / "signals", tmp_path / "early"))
    grown(cache, more_rows(), teacher())
    shutil.rmtree(cache / "signals")
    shutil.copytree(early, cache / "signals")

    with pytest.raises(UsageError, match=r"needs topk_ids.*xkd-cache add .* --model PATH_OF_T$"):
        Cache(cache, student="S").require("uld", (Signal("topk_ids"),))
    assert grown(cache, None, teacher()).built.keys() == {"signals/T.1"}
    Cache(cache, student="S").require("uld", (Signal("topk_ids"),))
    assert verify(cache, "deep") == []


def test_signals_of_another_teacher_are_refused(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    before = files_of(cache)
    other = small_cache.llama(tmp_path / "other", seed=5)

    with pytest.raises(Mismatch, match=r"weights.model.safetensors: cache has"):
        add_signals(cache, "T", str(other), lambda _layers: [Signal("hidden", 2)], "", IN_PROCESS)
    assert files_of(cache) == before


def test_a_teacher_that_was_begun_and_never_finished_is_named(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    shutil.copytree(cache / "teachers/T", cache / "teachers/U")
    (cache / "teachers/U/manifest.json").unlink()
    told: list[str] = []

    take_in(cache, [open_source(str(more_rows()), columns={})], MORE, [str(teacher())], IN_PROCESS, told.append)

    assert "teachers/U: begun and never finished, so nothing is added to it" in told
    assert not (cache / "teachers/U/added").exists()
