"""The plan against the cache that is then made, and what it says in words."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import small_cache
from fake_hardware import hardware_is
from small_cache import SPACY, corpus_rows, made, whole_run, write_rows
from xkd_pipeline.capture import passes
from xkd_pipeline.capture.artifacts import sizes_of
from xkd_pipeline.cli.app import app
from xkd_pipeline.reports import plan as size
from xkd_pipeline.reports.plan import make_plan, parse_size, plan_lines, read_plan_sample
from xkd_pipeline.reports.sample import spread_evenly
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import PLAIN
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError
from xkd_schemas.signals import KINDS, OFFSET_BYTES, Signal, signal_bytes
from xkd_trainer.models.forward import empty_model
from xkd_trainer.models.loading import load_model


def command(*arguments: object) -> None:
    app(["plan", *map(str, arguments)], standalone_mode=False)


def small_run(**sections: dict[str, object]) -> RunConfig:
    return whole_run(made() / "cache", **sections)


def planned(run: RunConfig, **options: Any) -> dict[str, Any]:
    return make_plan(run, **{"sample": 256, "budget": None, "rate": None} | options)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return planned(small_run())


def test_the_plan_counts_tokens_shards_and_the_whole_folder(whole: dict[str, Any]) -> None:
    manifest = Table(made() / "cache", "teachers/T").manifest
    sizes = {path: path.stat().st_size for path in (made() / "cache").rglob("*") if path.is_file()}

    assert whole["tokens"] == manifest.count("tokens")
    assert whole["shards"] == len(manifest.commits)
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    assert whole["files_bytes"] == pytest.approx(weights, rel=0.002)
    kinds = (".arrow", ".safetensors", ".jsonl")
    size = sum(size for path, size in sizes.items() if path.parent.name == "tokenizer" or path.suffix in kinds)
    assert whole["bytes"] == pytest.approx(size, rel=0.02)


def test_the_plan_is_within_five_percent_of_the_shards(tmp_path: Path) -> None:
    """Under planes; test_token_states has the other codecs."""
    corpus = write_rows(tmp_path / "many.jsonl", corpus_rows(64))
    shards, codec = {"rows_per_shard": 32}, {"codec": "bf16-planes"}
    run = small_cache.cache_of(tmp_path / "cache", corpus, documents=shards, teacher=codec)

    found = planned(run)

    for key, table in (("teacher", "teachers/T"), ("documents", "documents"), ("students", "students/S")):
        real = sum(commit.size for commit in Table(tmp_path / "cache", table).manifest.commits)
        assert found[f"{key}_bytes"] == pytest.approx(real, rel=0.05), key
    assert sum(column["bytes"] for column in found["columns"]) == found["teacher_bytes"]


def uneven_rows(number: int) -> list[dict[str, object]]:
    lengths = np.random.default_rng(7).lognormal(2.5, 0.7, (number, 2))[:, 0]
    words = ["The", "old", "tree", "near", "the", "small", "house", "was", "green", "and", "we", "saw", "it"]
    text = (" ".join(words[n % len(words)] for n in range(2 + int(length))) for length in lengths)
    return [{"prompt": f"{n}. What is there?", "response": t} for n, t in enumerate(text)]


def test_a_part_of_the_rows_scaled_by_their_sizes_tells_the_whole_within_five_percent(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "uneven.jsonl", uneven_rows(240))
    run = small_run(documents={"corpus": [str(corpus)], "rows_per_shard": 512})

    part, whole = planned(run, sample=60), planned(run, sample=1000)

    assert (part["sample"]["rows"], whole["sample"]["rows"], whole["shards"]) == (60, 240, 1)
    for key in ("teacher_bytes", "documents_bytes", "students_bytes", "tokens", "words"):
        assert part[key] == pytest.approx(whole[key], rel=0.05), key
        assert part[key] != whole[key]
    by_rows = part["tokens"] / read_plan_sample(run, 60).sample.scale * 4.0
    assert abs(by_rows / whole["tokens"] - 1.0) > 0.05
    assert part["give_or_take"] > whole["give_or_take"] == 0.0
    assert "give or take" in "\n".join(plan_lines(part))
    assert "give or take" not in "\n".join(plan_lines(whole))


def test_no_weight_is_read(whole: dict[str, Any], tmp_path: Path) -> None:
    source = made() / "teacher"
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())

    found = planned(small_run(teacher={"model": str(tmp_path)}))

    assert found["teacher_bytes"] == whole["teacher_bytes"]
    assert all(p.device.type == "meta" for p in empty_model(str(tmp_path)).parameters())


def test_of_a_streamed_teacher_reading_and_computing_are_told_apart_and_the_slower_is_the_limit(
    whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "memory_for", lambda _device: 10_000)
    monkeypatch.setattr(size, "disk_rate", lambda _name: 1e6)

    plans = {rate: planned(small_run(), rate=rate) for rate in (1e9, 1.0)}

    assert whole["stream"] == {}
    stored = whole["model"]["weights"] * 4
    for rate, limit in ((1e9, "reading"), (1.0, "computing")):
        plan, stream = plans[rate], plans[rate]["stream"]
        assert stream["read_seconds"] == pytest.approx((whole["shards"] + size.CHECKS) * stored / 1e6)
        assert stream["compute_seconds"] == pytest.approx(whole["tokens"] / rate)
        assert plan["seconds"] == max(stream["read_seconds"], stream["compute_seconds"])
        assert plan["memory"]["weights"] < whole["memory"]["weights"]
        said = "\n".join(plan_lines(plan))
        assert f"{limit} is the limit" in said
        assert "one after another: its weights take 0.0 GB, there is memory for 0.0 GB" in said
        group = round(whole["tokens"] / whole["shards"])
        assert f"a shard of {group:,} tokens, whose states take {group * 32 * 4 / 1000:.1f} kB" in said


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
    spans = {f"{unit} {per}": 2 for unit in ("word", "phrase") for per in ("K", "K(K-1)/2")}
    for name, kind in KINDS.items():
        signal = Signal(name, 1 if kind.layer else None, "word" if kind.unit else None, 2 if kind.top else None)
        assert signal_bytes(signal, 8, PLAIN, {"T": 9, "R": 5, "N": 4, **spans}, 1) > OFFSET_BYTES, name


def test_a_budget_says_what_to_change_and_what_each_codec_needs(whole: dict[str, Any]) -> None:
    assert [c["bytes"] for c in whole["columns"]] == sorted((c["bytes"] for c in whole["columns"]), reverse=True)
    needs = {c["column"]: c["losses"] for c in whole["columns"]}
    assert (needs["hidden_last"], needs["argmax"], needs["tokens"]) == (["sra", "dwa"], ["evaluation"], [])
    assert whole["codecs"]["int8"] == planned(small_run(teacher={"codec": "int8"}))["bytes"]

    advice = list(plan_lines(whole | {"budget": whole["bytes"] - whole["teacher_bytes"] // 2}))[-4:]
    assert advice[0].endswith("too large. What to change:")
    assert "--codec bf16-planes needs" in advice[1]
    assert "drop a loss from --for" in advice[2]
    assert "% of the documents" in advice[3]
    assert list(plan_lines(whole | {"budget": whole["bytes"]}))[-1].endswith("the cache fits")
    once = whole["files_bytes"] + whole["tokenizers_bytes"]
    assert "head, embeddings and tokenizers alone take" in list(plan_lines(whole | {"budget": once}))[-1]
    assert "alone" not in "\n".join(plan_lines(whole | {"budget": once + 1}))


def test_a_teacher_table_for_alm_is_a_hundredth_of_one_with_states_of_width_3584() -> None:
    runs = [small_run(teacher={"losses": [loss]}) for loss in ("alm", "kl")]
    look, wide = read_plan_sample(runs[0], 12), replace(sizes_of(str(made() / "teacher")), width=3584)

    few, states = (size.teacher_parts(run, look, wide, PLAIN) for run in runs)

    assert {*few} == {"argmax", "target_logprob", "tokens", "frames"}
    assert sum(few.values()) <= 0.01 * sum(states.values())


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e9"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_unknown_time_says_how_to_measure_and_a_rate_gives_it(whole: dict[str, Any]) -> None:
    assert "time: not known" in "\n".join(plan_lines(whole))

    timed = planned(small_run(), rate=float(whole["tokens"]) / 3661)

    assert "time: 1:01:01 at" in "\n".join(plan_lines(timed))


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
    assert {c["column"] for c in found["columns"]} == {"hidden_last", "frames", "tokens", "entropy", "argmax"}
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


@given(total=st.integers(1, 60), wanted=st.integers(1, 60))
def test_a_sample_is_spread_and_has_no_row_twice(total: int, wanted: int) -> None:
    chosen = list(spread_evenly(total, wanted))

    assert len(set(chosen)) == len(chosen) == min(total, wanted)
    borders = [number * total // len(chosen) for number in range(len(chosen) + 1)]
    assert all(low <= at < high for (low, high), at in zip(pairwise(borders), chosen, strict=True))
