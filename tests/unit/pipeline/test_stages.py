"""The stages of a run file: names, choices and what is said about each."""

import shutil
from pathlib import Path

import pytest

import small_cache
from small_cache import made
from xkd_pipeline.stages import only_teacher, plain_name, preprocess, signals_for
from xkd_schemas.errors import InputMissing, UsageError
from xkd_schemas.files import SAFE_NAME
from xkd_schemas.table import names_in


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/SmolLM2-135M/", "SmolLM2-135M"),
        ("owner/name", "name"),
        ("C:\\models\\big one", "big-one"),
        ("x/model.Q4_K.gguf", "model.Q4_K"),
        ("../..", "model"),
        ("/data/.hidden", "hidden"),
        ("é", "model"),
        ("é..", "model"),
        ("a" * 300, "a" * 128),
    ],
)
def test_a_models_name_becomes_a_name_that_a_folder_may_have(model: str, name: str) -> None:
    assert plain_name(model) == name
    assert SAFE_NAME.fullmatch(plain_name(model))


@pytest.mark.parametrize("model", ["/", "", "//"])
def test_a_path_without_a_name_still_gives_one(model: str) -> None:
    assert plain_name(model) == "model"


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


def test_no_loss_keeps_just_the_teachers_choice(tmp_path: Path) -> None:
    run = small_cache.run_file(tmp_path, teacher={"losses": []})

    assert [s.column for s in signals_for(run, 4)] == ["argmax"]


def test_layers_and_settings_of_a_loss_choose_its_signals(tmp_path: Path) -> None:
    run = small_cache.run_file(tmp_path, teacher={"losses": ["mta"], "word_layers": [1], "phrase_layers": [3]})
    layers = {(s.layer, s.unit) for s in signals_for(run, 4) if s.name == "span_mass"}
    assert layers == {(1, "word"), (3, "phrase")}

    settings = run.model_copy(update={"losses": {"mta": {"lambda_dsa": 0.0}}})
    assert not any(s.name == "span_geometry" for s in signals_for(settings, 4))

    unknown = run.model_copy(update={"losses": {"mta": {"lambda_dsq": 0.0}}})
    with pytest.raises(UsageError, match=r"losses\.mta: 'lambda_dsq'.*lambda_dsa"):
        signals_for(unknown, 4)


def test_preprocess_makes_the_three_tables_and_tells_each_as_it_ends(tmp_path: Path) -> None:
    corpus = small_cache.write_rows(tmp_path / "corpus.jsonl", small_cache.corpus_rows())
    run = small_cache.run_file(
        tmp_path / "cache",
        documents={"corpus": [str(corpus)]},
        teacher={"model": str(made() / "teacher")},
        student={"tokenizer": str(made() / "student")},
    )
    said: list[str] = []

    outcomes = preprocess(run, small_cache.IN_PROCESS, said.append)

    assert [o.values["table"] for o in outcomes] == ["documents", "teachers/T", "students/S"]
    assert [o.values["made"] for o in outcomes] == [3, 3, 3]
    assert said[1:] == [o.line for o in outcomes]
    assert said[0] == f"{corpus}: 12 rows, prompt and response (prompt, response)"
    assert all("3 shards made, 0 reused" in o.line for o in outcomes)
    assert small_cache.files_of(tmp_path / "cache") == small_cache.files_of(made() / "cache")


def test_without_names_the_tables_take_those_of_the_models(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made() / "cache" / "documents", cache / "documents")
    corpus = made() / "corpus.jsonl"
    run = small_cache.run_file(
        cache,
        documents={"corpus": [str(corpus)]},
        teacher={"model": str(made() / "teacher"), "name": ""},
        student={"model": str(made() / "student"), "name": ""},
    )

    preprocess(run, small_cache.IN_PROCESS, lambda _line: None)

    assert (names_in(cache, "teachers"), names_in(cache, "students")) == (["teacher"], ["student"])
