"""The teacher table: what stands beside it, its constants, and what it refuses to be mixed with."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import small_cache
from fake_hardware import hardware_is
from small_cache import made
from tiny_gguf import write_gguf
from xkd_pipeline.capture.artifacts import sizes_of
from xkd_pipeline.capture.stage import teacher_layers
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.reports.compare import compare_models
from xkd_pipeline.reports.plan import make_plan
from xkd_pipeline.reports.sample import read_sample
from xkd_pipeline.stages import Outcome, align_stage, teacher_stage
from xkd_pipeline.tables.shard import encoder_for
from xkd_schemas.cache.manifest import Commit, read_record
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import numbers_of
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import UsageError
from xkd_schemas.tokens import kept_rows
from xkd_trainer.data.cache import Cache
from xkd_trainer.evaluation import Request, evaluate_student
from xkd_trainer.models.loading import load_tokenizer


def stage(cache: Path, **teacher: object) -> Outcome:
    settings = {"model": str(made() / "teacher"), **teacher}
    return teacher_stage(small_cache.run_file(cache, teacher=settings), small_cache.IN_PROCESS)


def made_table() -> Table:
    return Table(made() / "cache", "teachers/T")


def model_in(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_head_embeddings_and_tokenizer_of_an_untied_teacher_stand_beside_the_table() -> None:
    table, model = made_table(), model_in(made() / "teacher")

    torch.testing.assert_close(load_file(table.folder / "head.safetensors")["weight"], model.lm_head.weight.data)
    embeddings = load_file(table.folder / "embeddings.safetensors")["weight"]
    torch.testing.assert_close(embeddings, model.get_input_embeddings().weight.data)
    assert not torch.equal(embeddings, model.lm_head.weight)
    kept = [table.folder / "head.safetensors", table.folder / "embeddings.safetensors"]
    kept += (table.folder / "tokenizer").iterdir()
    assert table.manifest.files == {path.name: sha256_of(path) for path in kept}
    tokenizer = AutoTokenizer.from_pretrained(table.folder / "tokenizer")
    text = "The old keeper lit the lamp 🙂."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(made() / "teacher")(text)["input_ids"]


def test_a_16_bit_checkpoint_that_runs_in_float32_keeps_a_16_bit_head_and_is_read_as_it_ran(tmp_path: Path) -> None:
    model = model_in(made() / "teacher").to(torch.bfloat16)
    shutil.copytree(made() / "teacher", tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    cache = small_cache.copied(tmp_path)
    stage(cache, model=str(tmp_path / "half"), name="half", losses=[])
    student = {"tokenizer": str(made() / "student"), "name": "new"}
    align_stage(small_cache.run_file(cache, student=student, teacher={"name": "half"}), small_cache.IN_PROCESS)

    folder, read = cache / "teachers/half", Cache(cache, student="new")
    sizes = sizes_of(str(tmp_path / "half"))
    weights = {"head": model.lm_head.weight, "embeddings": model.get_input_embeddings().weight}
    for name, weight in weights.items():
        assert load_file(folder / f"{name}.safetensors")["weight"].dtype == torch.bfloat16
        read_back = read.head().weight_VD if name == "head" else read.embeddings()
        assert read_back.dtype == torch.float32
        assert torch.equal(read_back, weight.float())
    stored = sum((folder / f"{name}.safetensors").stat().st_size for name in weights)
    said = read.teachers.manifest.constants
    assert (read.sizes.hidden_std, read.sizes.embedding_std) == (said["hidden_std"], said["embedding_std"])
    assert sizes.file_numbers * min(sizes.number_bytes, 4) == pytest.approx(stored, abs=1000)


def test_a_table_continued_on_another_processor_says_so_once(tmp_path: Path, monkeypatch, capsys) -> None:
    cache, table = small_cache.copied(tmp_path), "teachers/K"
    hardware_is(monkeypatch, has_bfloat16=False, factor=60.0)
    stage(cache, name="K", losses=[])
    root = Table(cache, table).manifest.root
    for unit in (1, 2):
        next((cache / table).glob(f"0000{unit}-*.arrow")).unlink()
    assert "continues" not in capsys.readouterr().err

    hardware_is(monkeypatch, has_bfloat16=True, factor=0.5, kind="CPU AMX_BF16")
    stage(cache, name="K", losses=[])

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("warning: teachers/K continues on CPU AMX_BF16, after CPU AVX2: numbers may differ")
    manifest = Table(cache, table).manifest
    records = [read_record(path, Commit) for path in sorted((cache / table / "commits").iterdir())]
    assert [record.made_on for record in records] == ["CPU AVX2", "CPU AMX_BF16", "CPU AMX_BF16"]
    assert [record.bound for record in records] == list(manifest.commits)
    assert manifest.root == root  # the same bytes: students that were aligned to it stay its students
    assert verify(cache) == []


def test_the_constants_say_what_the_teacher_is() -> None:
    found = made_table().manifest.constants

    expected = {
        "architecture": "LlamaForCausalLM", "num_layers": 4, "hidden_size": 32, "logit_scale": 1.0, "softcap": None,
        "tied": False, "template": "chat",
        "vocab_size": len(AutoTokenizer.from_pretrained(made() / "teacher")),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {*expected, "hidden_std", "embedding_std", "codec_error"}


def test_standard_deviations_are_those_over_all_targets_of_the_corpus() -> None:
    table, model = made_table(), model_in(made() / "teacher")
    states, embedded = [], []
    for row in table:
        at = np.flatnonzero(row["targets"])
        kept = kept_rows(row["targets"]).tolist()
        states.append(torch.from_numpy(numbers_of(row["hidden_last"]))[[kept.index(t - 1) for t in at]].double())
        embedded.append(model.get_input_embeddings().weight.detach()[row["token_ids"][at].astype(np.int64)].double())

    for name, values in (("hidden_std", states), ("embedding_std", embedded)):
        expected = float(torch.cat(values).flatten().std(correction=0))
        assert table.manifest.constants[name] == pytest.approx(expected, rel=1e-9), name


def test_the_outcome_counts_tokens_and_bytes() -> None:
    outcome = stage(made() / "cache")
    table = made_table()

    tokens = sum(len(row["token_ids"]) for row in table)
    size = sum(path.stat().st_size for path in table.folder.glob("*.arrow"))
    assert (outcome.values["tokens"], outcome.values["bytes"], outcome.values["documents"]) == (tokens, size, 12)
    assert outcome.line.startswith(f"teachers/T: {tokens} tokens, ")
    assert f"({size / tokens:.0f} bytes a token), kept: argmax, attention_text@4, " in outcome.line
    assert (outcome.values["made"], outcome.values["reused"]) == (0, 3)
    assert outcome.line.endswith("; all 3 shards reused")
    assert (outcome.values["seconds"], outcome.values["tokens_per_second"]) == (None, None)


def test_the_last_line_has_seconds_and_tokens_per_second_of_what_this_run_made(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    commit = Table(cache, "teachers/T").manifest.commits[1]
    (cache / "teachers" / "T" / commit.file).unlink()

    outcome = stage(cache)

    seconds, rate = outcome.values["seconds"], outcome.values["tokens_per_second"]
    assert rate * seconds == pytest.approx(commit.counts["tokens"])
    assert outcome.line.endswith(f"; 1 shards made, 2 reused in {seconds:.1f} s, {rate:.1f} tokens per second")


def test_a_document_too_long_for_the_teacher_is_cut_and_counted(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)

    outcome = stage(cache, name="short", max_tokens=36)

    rows = list(zip(Table(cache, "documents"), Table(cache, "teachers/short"), strict=True))
    cut = [t for d, t in rows if t["status"] == "ok" and t["num_chars"] < len(d["text"])]
    assert max(len(row["token_ids"]) for row in cut) <= 36
    assert f"{len(cut)} cut to fit" in outcome.line


def test_no_model_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no teacher is named.*xkd-cache teacher"):
        stage(tmp_path, model="")


def test_default_layers_are_half_three_quarters_and_the_top() -> None:
    assert teacher_layers(4) == ((2, "word"), (3, "phrase"), (4, "phrase"))
    assert teacher_layers(1) == ((1, "phrase"), (1, "word"))
    assert teacher_layers(12, [3], [6, 9]) == ((3, "word"), (6, "phrase"), (9, "phrase"))


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_a_layer_that_does_not_exist_is_refused_with_the_range(layer: int) -> None:
    with pytest.raises(UsageError, match=f"layer {layer} does not exist: the teacher has layers 1 to 4"):
        teacher_layers(4, [], [layer])


def test_a_gguf_teachers_tokenizer_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    cache = small_cache.copied(tmp_path)
    built: list[str] = []
    build = AutoTokenizer.from_pretrained

    def count(name: str, **options: Any) -> Any:
        built.append(name)
        return build(name, **options)

    monkeypatch.setattr("xkd_trainer.models.loading.AutoTokenizer.from_pretrained", count)
    stage(cache, model=str(model), name="new", losses=["kl"], template="none")

    assert len(Table(cache, "teachers/new")) == 12
    assert built == [str(tmp_path)]
    load_tokenizer(str(write_gguf(model)))  # another file, for all that is known
    assert built == [str(tmp_path)] * 2


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 600 embeddings, and a tokenizer with more tokens."""
    folder = shutil.copytree(made() / "teacher", tmp_path_factory.mktemp("short") / "model")
    model = model_in(folder)
    model.resize_token_embeddings(600)
    model.save_pretrained(folder)
    return folder


def compare_with_itself(model: Path) -> object:
    run = small_cache.run_file(model, documents={"corpus": [str(made() / "corpus.jsonl")]})
    encoder = encoder_for(str(model), run.teacher)
    return compare_models((str(model), str(model)), (encoder, encoder), "float32", read_sample(run, 12))


USES = {
    "teacher": lambda model, folder: stage(small_cache.copied(folder), model=str(model), name="new"),
    "plan": lambda model, _: make_plan(
        small_cache.run_file(made() / "cache", documents={"corpus": [str(made() / "corpus.jsonl")]},
                             teacher={"model": str(model)}), sample=4, budget=None, rate=None,
    ),
    "pair": lambda model, _: compare_with_itself(model),
    "eval": lambda model, _: evaluate_student(Request(student=model, data=made() / "corpus.jsonl", seeds=(1,))),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_an_id_without_an_embedding_is_refused_with_its_token(short_model: Path, tmp_path: Path, use: str) -> None:
    with pytest.raises(UsageError, match=rf"{short_model}: its tokenizer gives id \d+ \('.*'\), the model has 600"):
        USES[use](short_model, tmp_path)


def test_tokens_without_embeddings_that_nothing_uses_are_no_fault(tmp_path: Path) -> None:
    folder = shutil.copytree(made() / "teacher", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(folder)

    assert USES["eval"](folder, tmp_path)["documents"] == 12  # responses are padded
    assert USES["pair"](folder, tmp_path)["documents"] == 12
