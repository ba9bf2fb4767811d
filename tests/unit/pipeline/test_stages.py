"""The stages of a run file: names, choices and what is said about each."""

import shutil
from pathlib import Path

import pytest

import small_cache
from fake_hardware import hardware_is
from small_cache import made
from xkd_pipeline.stages import align_stage, documents_stage, plain_name, signals_for, teacher_dtype, teacher_stage
from xkd_schemas.cache.manifest import Plan, read_record, to_json
from xkd_schemas.cache.table import only_teacher
from xkd_schemas.durable_files import SAFE_NAME
from xkd_schemas.errors import InputMissing, Mismatch, UsageError


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/SmolLM2-135M/", "SmolLM2-135M"), ("owner/name", "name"), ("C:\\models\\big one", "big-one"),
        ("x/model.Q4_K.gguf", "model.Q4_K"), ("/data/.hidden", "hidden"), ("a" * 300, "a" * 128),
        *((nothing, "model") for nothing in ("../..", "é", "é..", "/", "", "//")),
    ],
)  # fmt: skip
def test_a_models_name_becomes_a_name_that_a_folder_may_have(model: str, name: str) -> None:
    assert plain_name(model) == name
    assert SAFE_NAME.fullmatch(plain_name(model))


def test_the_only_teacher_is_chosen_and_several_are_listed(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    assert only_teacher(cache) == "T"

    shutil.copytree(cache / "teachers" / "T", cache / "teachers" / "U")
    with pytest.raises(UsageError, match=r"has teachers T, U\. Next: choose one with --teacher NAME"):
        only_teacher(cache)

    (cache / "teachers" / "U" / "manifest.json").unlink()  # begun and not finished
    assert only_teacher(cache) == "T"
    (cache / "teachers" / "T" / "manifest.json").unlink()
    with pytest.raises(InputMissing, match=r"no finished teacher table.*--model MODEL"):
        only_teacher(cache)


def test_auto_is_resolved_once_and_a_table_goes_on_in_the_dtype_of_its_beginning(tmp_path: Path, monkeypatch) -> None:
    def chosen(dtype: str, name: str = "half") -> str:
        return teacher_dtype(small_cache.run_file(tmp_path, teacher={"name": name, "dtype": dtype}), "cpu").line

    plan = read_record(made() / "cache/teachers/T/plan.json", Plan)
    begun = plan.model_copy(update={"spec": plan.spec | {"dtype": "bfloat16"}})
    (tmp_path / "teachers/half").mkdir(parents=True)
    (tmp_path / "teachers/half/plan.json").write_bytes(to_json(begun))
    hardware_is(monkeypatch, has_bfloat16=True, factor=0.5, kind="CPU AMX_BF16")
    assert chosen("auto", "new").startswith("dtype: bfloat16, because CPU AMX_BF16 has bfloat16 instructions")

    hardware_is(monkeypatch, has_bfloat16=False, factor=63.4)
    assert chosen("auto", "new").startswith("dtype: float32, because CPU AVX2 has no bfloat16 instructions")
    assert chosen("auto") == "dtype: bfloat16, as teachers/half was begun"
    assert chosen("bf16") == "dtype: bfloat16, as asked for"


STAGES = {"documents": documents_stage, "teacher": teacher_stage, "student": align_stage}


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        ("documents", {"max_words": 5}, "parser.max_words: cache has 12, this run has 5"),
        ("documents", {"drop_contained": False}, "parser.drop_contained: cache has True, this run has False"),
        ("documents", {"rows_per_shard": 5}, "rows_per_shard: cache has 4, this run has 5"),
        ("documents", {"max_chars": 9000}, "max_chars: cache has 1000000, this run has 9000"),
        ("documents.columns", {"response": "prompt"}, "response: cache has response, this run has prompt"),
        ("teacher", {"dtype": "bfloat16"}, "dtype: cache has float32, this run has bfloat16"),
        ("teacher", {"template": "none"}, "encoder.template: cache has chat, this run has none"),
        ("teacher", {"max_tokens": 64}, "encoder.max_tokens: cache has 1024, this run has 64"),
        ("teacher", {"batch_tokens": 512}, "batch_tokens: cache has 256, this run has 512"),
        ("teacher", {"codec": "int8"}, "codec: cache has bf16, this run has int8"),
        ("teacher", {"phrase_layers": [2, 4]}, "signals: cache has "),
        ("student", {"max_tokens": 512}, "encoder.max_tokens: cache has 1024, this run has 512"),
        ("student", {"tokenizer": "teacher"}, "encoder.tokenizer."),
    ],
)
def test_a_table_with_other_settings_is_refused_by_field(section: str, changed: dict[str, object], said: str) -> None:
    if "tokenizer" in changed:
        changed = {"tokenizer": str(made() / "teacher")}
    run, name = small_cache.whole_run(made() / "cache", **{section: changed}), section.partition(".")[0]

    with pytest.raises(Mismatch) as caught:
        STAGES[name](run, small_cache.IN_PROCESS, lambda _line: None)
    assert said in str(caught.value)
    other = "other rows: --out OTHER" if name == "documents" else "or give this one another --name"
    assert f"Next: repeat the first command's settings; {other}" in str(caught.value)


def test_layers_and_settings_of_a_loss_choose_its_signals(tmp_path: Path) -> None:
    run = small_cache.run_file(tmp_path, teacher={"losses": ["mta"], "word_layers": [1], "phrase_layers": [3]})
    layers = {(s.layer, s.unit) for s in signals_for(run, 4) if s.name == "span_mass"}
    assert layers == {(1, "word"), (3, "phrase")}

    none = small_cache.run_file(tmp_path, teacher={"losses": []})
    assert signals_for(none, 4) == [s for s in signals_for(run, 4) if s.name == "argmax"] != []

    settings = run.model_copy(update={"losses": {"mta": {"lambda_dsa": 0.0}}})
    assert not any(s.name == "span_geometry" for s in signals_for(settings, 4))

    unknown = run.model_copy(update={"losses": {"mta": {"lambda_dsq": 0.0}}})
    with pytest.raises(UsageError, match=r"losses\.mta: 'lambda_dsq'.*lambda_dsa"):
        signals_for(unknown, 4)


def test_documents_and_teacher_say_how_far_they_are_inside_a_shard(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("xkd_schemas.progress.EVERY", -1.0)  # every tick is shown
    run = small_cache.whole_run(tmp_path / "cache", documents={"rows_per_shard": 6}, teacher={"batch_tokens": 100})
    capsys.readouterr()
    documents_stage(run, small_cache.IN_PROCESS)
    teacher_stage(run, small_cache.IN_PROCESS)
    said = capsys.readouterr().err

    for table in ("documents", "teachers/T"):
        lines = [line for line in said.splitlines() if line.startswith(f"{table}: ")]
        counts = [int(line.split()[1]) for line in lines]
        assert {2, 4, 6, 8, 10, 12} <= {n + n % 2 for n in counts}, lines
        assert counts == sorted(counts)
        assert any("7 of 12 rows" in line and ", 1 of 2 shards done" in line for line in lines)
        assert lines[-1].endswith("left, 2 of 2 shards done")
