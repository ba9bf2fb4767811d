"""The plan against the cache that is then made, and what it says in words."""

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import small_cache
from fake_hardware import hardware_is
from small_cache import SPACY, corpus_rows, made, run_file, write_rows
from xkd_pipeline.capture.model_sizes import empty_model, sizes_of
from xkd_pipeline.cli.app import app
from xkd_pipeline.reports import budget
from xkd_pipeline.reports import table_size as size
from xkd_pipeline.reports.plan import give_or_take, look_at, make_plan
from xkd_pipeline.reports.plan_text import plan_lines
from xkd_pipeline.reports.sample import evenly
from xkd_pipeline.stages import documents_stage, teacher_stage
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import CODECS, PLAIN
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError
from xkd_schemas.ragged import column_of
from xkd_schemas.signals import KINDS, Kind
from xkd_trainer.models.loading import load_model


def command(*arguments: object) -> None:
    app(["plan", *map(str, arguments)], standalone_mode=False)


def small_run(**sections: dict[str, object]) -> RunConfig:
    folder = made()
    return run_file(
        folder / "cache",
        documents={"corpus": [str(folder / "corpus.jsonl")]} | sections.get("documents", {}),
        teacher={"model": str(folder / "teacher")} | sections.get("teacher", {}),
        student={"tokenizer": str(folder / "student")},
    )


def planned(run: RunConfig, **options: Any) -> dict[str, Any]:
    return make_plan(run, **{"sample": 256, "budget": None, "rate": None} | options)


def stored(table: str) -> int:
    return sum(commit.size for commit in Table(made() / "cache", table).manifest.commits)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return planned(small_run())


def test_the_plan_is_the_size_of_the_shards_that_are_made(whole: dict[str, Any]) -> None:
    for key, table in (
        ("teacher_bytes", "teachers/T"),
        ("documents_bytes", "documents"),
        ("students_bytes", "students/S"),
    ):
        assert whole[key] == pytest.approx(stored(table), rel=0.002), table
    manifest = Table(made() / "cache", "teachers/T").manifest
    assert whole["tokens"] == manifest.count("tokens")
    assert whole["shards"] == len(manifest.commits)
    folder = made() / "cache" / "teachers" / "T"
    files = sum((folder / f"{name}.safetensors").stat().st_size for name in ("head", "embeddings"))
    assert whole["files_bytes"] == pytest.approx(files, rel=0.002)


@pytest.mark.parametrize("codec", [name for name in CODECS if name != PLAIN])
def test_the_plan_is_within_five_percent_of_the_shards_of_every_codec(codec: str, tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "many.jsonl", corpus_rows(60))
    sections: dict[str, Any] = {
        "documents": {"corpus": [str(corpus)], "rows_per_shard": 32},
        "teacher": {"model": str(made() / "teacher"), "codec": codec, "losses": ["dwa"]},
    }
    run = run_file(tmp_path / "cache", **sections)
    documents_stage(run, small_cache.IN_PROCESS)
    teacher_stage(run, small_cache.IN_PROCESS)

    found = planned(run)

    real = sum(commit.size for commit in Table(tmp_path / "cache", "teachers/T").manifest.commits)
    assert found["teacher_bytes"] == pytest.approx(real, rel=0.05)


def test_a_part_of_the_rows_tells_the_whole_within_five_percent(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "many.jsonl", corpus_rows(200))
    run = small_run(documents={"corpus": [str(corpus)], "rows_per_shard": 512})

    part, all_rows = planned(run, sample=80), planned(run, sample=1000)

    assert (part["sample"]["rows"], all_rows["sample"]["rows"], all_rows["shards"]) == (80, 200, 1)
    assert part["teacher_bytes"] != all_rows["teacher_bytes"]
    assert part["give_or_take"] > all_rows["give_or_take"] == 0.0
    assert "give or take" in "\n".join(plan_lines(part))
    assert "give or take" not in "\n".join(plan_lines(all_rows))
    for key in ("teacher_bytes", "documents_bytes", "students_bytes", "tokens", "words"):
        assert part[key] == pytest.approx(all_rows[key], rel=0.05), key


def uneven_rows(number: int, noise: int) -> list[dict[str, object]]:
    """Rows of very different lengths; with `noise`, their sizes say little about their text."""
    lengths = np.random.default_rng(7).lognormal(2.5, 0.7, (number, 2))
    words = ["The", "old", "tree", "near", "the", "small", "house", "was", "green", "and", "we", "saw", "it"]
    text = (" ".join(words[n % len(words)] for n in range(2 + int(length))) for length, _ in lengths)
    return [
        {"prompt": f"{n}. What is there?", "response": t, "note": "x" * int(noise * more)}
        for n, (t, (_, more)) in enumerate(zip(text, lengths, strict=True))
    ]


@pytest.mark.parametrize(("noise", "by_rows"), [(0, False), (200, True)])
def test_a_sample_is_scaled_by_what_tells_its_tokens_better(tmp_path: Path, noise: int, by_rows: bool) -> None:
    corpus = write_rows(tmp_path / "uneven.jsonl", uneven_rows(240, noise))
    run = small_run(documents={"corpus": [str(corpus)]})
    look = look_at(run, 60)

    scale, error = look.scale

    assert look.sample.scale == 4.0
    assert (scale == look.sample.scale) is by_rows
    by_row_error = give_or_take([c.tokens for c in look.counts], 4.0)
    assert error == by_row_error if by_rows else error < by_row_error / 4
    if not by_rows:
        part, whole = planned(run, sample=60), planned(run, sample=240)
        for key in ("teacher_bytes", "documents_bytes", "students_bytes", "tokens", "words"):
            assert part[key] == pytest.approx(whole[key], rel=0.05), key
        assert abs(part["tokens"] / scale * 4.0 / whole["tokens"] - 1.0) > 0.05


def test_bytes_of_each_column_are_those_of_the_made_column(whole: dict[str, Any]) -> None:
    columns = {column["column"]: column["bytes"] for column in whole["columns"]}
    table = Table(made() / "cache", "teachers/T")
    for name in ("hidden_last", "span_geometry@2:word", "span_vectors@3:phrase", "argmax"):
        batches = [table.shard(number).batch(0).column(name) for number in range(3)]
        real = sum(size.padded(b.size) for array in batches for b in array.buffers() if b is not None)
        assert columns[name] == pytest.approx(real, abs=64 * 3), name
    assert sum(columns.values()) == whole["teacher_bytes"]


def test_no_weight_is_read(whole: dict[str, Any], tmp_path: Path) -> None:
    source = made() / "teacher"
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())

    found = planned(small_run(teacher={"model": str(tmp_path)}))

    assert found["teacher_bytes"] == whole["teacher_bytes"]
    assert all(p.device.type == "meta" for p in empty_model(str(tmp_path)).parameters())


@pytest.mark.parametrize("make", [small_cache.llama, small_cache.gpt2])
def test_sizes_from_the_configuration_are_those_of_the_loaded_model(make: Any, tmp_path: Path) -> None:
    name = str(make(tmp_path / "model"))
    model = load_model(name, dtype=torch.float32)

    sizes = sizes_of(name)

    assert sizes.weights == sum(p.numel() for p in model.parameters())
    assert (sizes.classes, sizes.width) == tuple(model.get_output_embeddings().weight.shape)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sizes.file_numbers == sizes.classes * sizes.width * (1 if tied else 2)


def test_every_kind_of_signal_can_be_counted() -> None:
    assert set(get_args(get_type_hints(Kind)["per"])) <= size.PER.keys()
    assert {kind.per for kind in KINDS.values()} <= size.PER.keys()


@given(numbers=st.lists(st.integers(0, 9), min_size=1, max_size=12), width=st.integers(0, 5), rows=st.integers(1, 5))
def test_columns_are_counted_as_arrow_writes_them(numbers: list[int], width: int, rows: int) -> None:
    item = pa.list_(pa.field("item", pa.uint16(), nullable=False), width) if width else pa.float32()
    kind = pa.large_list(pa.field("item", item, nullable=False))
    real = 0
    for first in range(0, len(numbers), rows):
        part = [np.zeros((n, width) if width else n) for n in numbers[first : first + rows]]
        batch = pa.RecordBatch.from_arrays([column_of(part, kind)], ["x"])
        real += pa.ipc.read_message(batch.serialize()).body.size

    assert size.column_bytes(kind, numbers, rows) == real


def test_a_codec_or_type_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="does not know the size"):
        size.width_of(pa.string())


# budget


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    """All ways down of the small run."""
    found: list[dict[str, Any]] = planned(small_run(), budget=0)["steps"]
    return found


def test_a_budget_goes_down_step_by_step_until_it_fits(whole: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    assert [step["flags"] for step in steps] == [
        "--codec bf16-planes", "--set losses.mta.hid=off", "--phrase-layers 4", "--for sra,dwa", "teacher.losses = []"
    ]  # fmt: skip
    sizes = [whole["bytes"], *(step["bytes"] for step in steps)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert not any(step["fits"] for step in steps)

    found = planned(small_run(), budget=steps[1]["bytes"])["steps"]
    assert [step["fits"] for step in found] == [False, True]
    assert planned(small_run(), budget=whole["bytes"])["steps"] == []


def test_a_budget_that_head_and_embeddings_alone_exceed_is_said_to_be_one(whole: dict[str, Any]) -> None:
    said = list(plan_lines(whole | {"budget": whole["files_bytes"] - 1}))

    assert "head and embeddings alone take" in said[-1]
    assert "alone" not in "\n".join(plan_lines(whole | {"budget": whole["files_bytes"] + 1}))


def test_the_plan_counts_the_whole_folder(whole: dict[str, Any]) -> None:
    records = {"README.md", "SHA256SUMS", "LOCK"}
    files = [p for p in (made() / "cache").rglob("*") if p.is_file() and p.name not in records]
    size = sum(p.stat().st_size for p in files if p.parent.name == "tokenizer" or p.suffix != ".json")

    assert whole["bytes"] == pytest.approx(size, rel=0.01)


def test_int8_is_a_step_where_its_scales_weigh_less_than_it_saves(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "many.jsonl", corpus_rows(100))

    found = planned(small_run(documents={"corpus": [str(corpus)], "rows_per_shard": 512}), budget=0)

    assert [step["flags"] for step in found["steps"]][:2] == ["--codec bf16-planes", "--codec int8"]


def test_a_step_is_as_big_as_the_plan_with_its_flags(steps: list[dict[str, Any]]) -> None:
    coded = small_run(teacher={"codec": "bf16-planes"})
    mta = coded.model_copy(update={"losses": {"mta": {"hid": "off"}}})

    assert steps[0]["bytes"] == planned(coded)["bytes"]
    assert steps[1]["bytes"] == planned(mta)["bytes"]
    assert steps[3]["bytes"] == planned(small_run(teacher={"codec": "bf16-planes", "losses": ["sra", "dwa"]}))["bytes"]


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e9"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        budget.bytes_named(text)


# words


def test_unknown_time_says_how_to_measure_and_a_rate_gives_it(whole: dict[str, Any]) -> None:
    assert "time: not known" in "\n".join(plan_lines(whole))

    timed = planned(small_run(), rate=float(whole["tokens"]) / 3661)

    assert "time: 1:01:01 at" in "\n".join(plan_lines(timed))


def test_states_and_logits_of_the_picked_layers_are_what_is_compared_with(whole: dict[str, Any]) -> None:
    naive = whole["naive"]

    assert naive["layers"] == [2, 3, 4]
    assert naive["bytes"] == whole["tokens"] * 2 * (3 * 32 + whole["model"]["classes"])
    assert naive["share"] == pytest.approx(whole["teacher_bytes"] / naive["bytes"])


def test_rejected_rows_are_counted_and_shown(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "half.jsonl", [*corpus_rows(3), "{"])

    found = planned(small_run(documents={"corpus": [str(corpus)]}))

    assert found["sample"]["rejected"] == 1
    assert "1 rejected (bad_json 1)" in "\n".join(plan_lines(found))


def test_what_a_corpus_is_called_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_rows(tmp_path / "a\x1b[31m.jsonl", corpus_rows(2))
    command(corpus, "--model", made() / "teacher", "--spacy-model", SPACY, "--sample", 2)

    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "needed: " in out


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", made() / "teacher", "--for", "dwa", "--dtype", "fp32", "--spacy-model", SPACY]
    command(made() / "corpus.jsonl", *model, "--sample", 4, "--budget", "1MB", "--json")

    found = json.loads(capsys.readouterr().out)
    assert [c["column"] for c in found["columns"]] == ["argmax", "entropy", "hidden_last", "tokens", "frames"]
    assert (found["budget"], found["students_bytes"], found["dtype"]) == (10**6, None, "float32")


def test_the_dtype_and_its_reason_are_printed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware_is(monkeypatch, has_bfloat16=True, factor=0.5, kind="CPU AMX_BF16")
    run = small_run(teacher={"dtype": "auto", "name": "another"})
    fast = planned(run, sample=2)
    hardware_is(monkeypatch, has_bfloat16=False, factor=63.4)
    slow = planned(run, sample=2)

    assert (fast["dtype"], slow["dtype"], slow["files_bytes"]) == ("bfloat16", "float32", 2 * fast["files_bytes"])
    assert slow["memory"]["weights"] == 2 * fast["memory"]["weights"]
    said = [next(line for line in plan_lines(p) if line.startswith("dtype: ")) for p in (fast, slow)]
    assert said[0].startswith("dtype: bfloat16, because CPU AMX_BF16 has bfloat16 instructions")
    assert said[1].endswith("bfloat16 products take 63 times as long as float32")
    asked = planned(small_run(teacher={"dtype": "bf16", "name": "another"}), sample=2)
    assert "warning: bfloat16 products take 63 times" in "\n".join(plan_lines(asked))


def test_a_missing_model_or_corpus_or_loss_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no teacher is named"):
        command("x.jsonl")
    with pytest.raises(UsageError, match="'sar' is not a loss"):
        command("nowhere.jsonl", "--model", made() / "teacher", "--for", "sar")
    with pytest.raises(UsageError, match="no corpus is named"):
        command("--model", made() / "teacher")


@given(total=st.integers(1, 60), wanted=st.integers(1, 60))
def test_a_sample_is_spread_and_has_no_row_twice(total: int, wanted: int) -> None:
    chosen = list(evenly(total, wanted))

    assert len(set(chosen)) == len(chosen) == min(total, wanted)
    assert all(
        number * total // len(chosen) <= at < (number + 1) * total // len(chosen) for number, at in enumerate(chosen)
    )
