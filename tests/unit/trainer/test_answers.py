"""Answers to prompts: the same bytes after any trouble and in any order, every answer kept or counted, refusals."""

import functools
import json
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import faulty_disk
import tiny_models as tiny
from small_cache import write_rows
from xkd_schemas.config import RunConfig
from xkd_schemas.corpus.sources import open_source, read_documents
from xkd_schemas.errors import BadData, DiskFailed, InputMissing, Mismatch, UsageError, XkdError
from xkd_trainer import answers
from xkd_trainer.answers import Answering, Prompts, describe, make_here, write_answers

KIND = "byte_level"
ASKED = [{"prompt": asked, "response": "not read"} for asked, _ in tiny.PAIRS[:7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.saved(tiny.llama(KIND, seed=1), KIND, tmp_path_factory.mktemp("speaker")))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = tiny.llama(KIND, seed=1)
    monkeypatch.setattr(answers, "speaker_of", lambda *_: speaker)
    monkeypatch.setattr(answers, "reader_of", functools.cache(answers.reader_of))


@pytest.fixture
def ask(model: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Answer `rows` into a file of this test."""

    def ask(out: str, rows: Any = ASKED, make: Any = make_here, form: str = "auto", **how: Any) -> dict[str, Any]:
        how = {"n": 2, "max_new_tokens": 5, "batch_size": 4, "keep_cut": True, **how}
        run = RunConfig(teacher={"model": model, "dtype": "float32"}, generation=how, documents={"form": form})
        prompts = tmp_path / "prompts.jsonl" if rows is None else write_rows(tmp_path / "prompts.jsonl", rows)
        return write_answers(run, str(prompts), tmp_path / out, make)

    return ask


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_two_workers(answering: Answering, jobs: Iterable[Prompts]) -> None:
    """Each has a copy of its own, and the later units are finished first."""
    workers = [pickle.loads(pickle.dumps(answering)).load() for _ in range(2)]
    for number, prompts in enumerate(reversed(list(jobs))):
        workers[number % 2](prompts)


def test_answers_are_the_same_by_any_workers_in_any_order_and_each_has_its_seed(ask: Any, tmp_path: Path) -> None:
    found = ask("a.jsonl")
    ask("b.jsonl", make=by_two_workers)
    other = ask("c.jsonl", seed=1)

    rows = lines(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (found["prompts"], found["answers"], found["made"], other["kept"]) == (7, 14, 4, 14)
    assert [(row["generated"]["row"], row["generated"]["sample"]) for row in rows] == [
        (row, sample) for row in range(1, 8) for sample in (0, 1)
    ]
    assert len({row["generated"]["seed"] for row in rows}) == 14
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a.json", "a.jsonl"]
    assert [row["response"] for row in rows] != [row["response"] for row in lines(tmp_path / "c.jsonl")]
    more = ask("d.jsonl", [*ASKED, *ASKED])
    assert lines(tmp_path / "d.jsonl")[:14] == rows
    assert more["kept"] == 28


def test_a_disk_that_fails_at_any_operation_loses_no_finished_unit_and_the_same_command_goes_on(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [[number] for number in range(50, 56)]
    monkeypatch.setattr(answers, "generate", lambda *_, seeds, **__: [said[seed % 6] for seed in seeds])
    with faulty_disk.injected("*:0:count") as disk:
        ask("0.jsonl", ASKED[:3])
    whole = [(tmp_path / f"0{end}").read_bytes() for end in (".jsonl", ".json")]
    for number in range(1, len(disk.points) + 1):
        with faulty_disk.injected(f"*:{number}:EIO"), pytest.raises(DiskFailed):
            ask(f"{number}.jsonl", ASKED[:3])
        finished = len(list((tmp_path / f"{number}.jsonl.units").glob("0*.jsonl")))
        assert finished >= (number > len(disk.points) * 3 // 4)

        found = ask(f"{number}.jsonl", ASKED[:3])

        assert found["made"] == 2 - finished
        assert [(tmp_path / f"{number}{end}").read_bytes() for end in (".jsonl", ".json")] == whole
        assert not (tmp_path / f"{number}.jsonl.units").exists()


def test_a_stopped_run_keeps_its_finished_units_and_makes_a_damaged_one_again(ask: Any, tmp_path: Path) -> None:
    def stopped(answering: Answering, jobs: Iterable[Prompts]) -> None:
        make = answering.load()
        for prompts in jobs:
            if prompts.unit == 2:
                raise KeyboardInterrupt
            make(prompts)

    ask("whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        ask("a.jsonl", make=stopped)
    damaged, _ = sorted((tmp_path / "a.jsonl.units").glob("0*.jsonl"))
    damaged.write_bytes(damaged.read_bytes().replace(b"end", b"END").replace(b"length", b"LENGTH"))

    assert ask("a.jsonl")["made"] == 3
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert ask("a.jsonl") | {"made": 4, "out": ""} == ask("whole.jsonl") | {"made": 4, "out": ""}
    assert describe(ask("a.jsonl")).endswith("nothing to do")


FORMS: dict[str, list[dict[str, Any]]] = {
    "prompt_response": [{"prompt": "Who?"}, {"prompt": "Where?"}],
    "alpaca": [{"instruction": "Count.", "input": "1 2", "output": "3"}, {"instruction": "Sing."}],
    "messages": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                      {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "not read"}]},
        {"messages": [{"role": "user", "content": "Where?"}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_each_form_are_answered_and_are_a_corpus_of_that_form(form: str, ask: Any, tmp_path: Path) -> None:
    ask("a.jsonl", FORMS[form], n=1, policy="student")

    source = open_source(str(tmp_path / "a.jsonl"), columns={})
    documents, rejected = read_documents("a", source.form, source.columns, list(source.rows()))
    assert (source.form, rejected, len(documents)) == (form, [], 2)
    assert [document.policy for document in documents] == ["student"] * 2
    assert "not read" not in documents[0].text
    for row, document in zip(lines(tmp_path / "a.jsonl"), documents, strict=True):
        said = (
            row["messages"][-1]["content"] if form == "messages" else row[{"alpaca": "output"}.get(form, "response")]
        )
        last = document.segments[-1]
        assert (document.text[last.start : last.end], last.target) == (said, True)


def test_a_prompt_ends_where_the_answer_begins_and_earlier_turns_are_part_of_it(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def listen(_model: Any, tokenizer: Any, prompts: Any, *_: Any, **__: Any) -> list[list[int]]:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [[50]] * len(prompts)

    monkeypatch.setattr(answers, "generate", listen)
    ask("a.jsonl", FORMS["messages"], n=1)

    assert seen[0].rstrip().endswith("Who?")
    assert "Yes?" in seen[0]
    assert all("not read" not in text for text in seen)


def test_every_answer_is_kept_or_counted_with_the_reason(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = tiny.tokenizer_of(KIND).eos_token_id
    said = iter([[50, 51, end], [50, 51, 52], [*[50] * 6, end], [end], [50, 51, 52, end], [5, end]])
    monkeypatch.setattr(answers, "generate", lambda _m, _t, prompts, *_, **__: [next(said) for _ in prompts])
    rows = [*ASKED[:6], "{broken", {"prompt": ""}, {"prompt": 7}, {"prompt": "x " * 600}]

    found = ask("a.jsonl", rows, n=1, keep_cut=False, max_repeat=6)

    assert found["stopped"] == {"end": 5, "length": 1}
    assert found["dropped"] == {"cut": 1, "repeated": 1, "short": 2}
    assert found["unusable"] == {"bad_json": 1, "bad_type": 1, "empty": 1, "no_target_after_cut": 1}
    assert (found["prompts"], found["answers"], found["kept"], found["tokens"]) == (10, 6, 2, 5)
    assert [row["generated"]["tokens"] for row in lines(tmp_path / "a.jsonl")] == [2, 3]
    assert describe(found).startswith(
        f"{tmp_path / 'a.jsonl'}: 2 of 6 answers to 10 prompts kept, 5 tokens; stopped: end 5, length 1; "
        "dropped: cut 1, repeated 1, short 2; prompts not used: bad_json 1, bad_type 1, empty 1, "
        "no_target_after_cut 1; 3 units made"
    )
    assert json.loads((tmp_path / "a.json").read_text())["counts"] == {
        key: value for key, value in found.items() if key not in ("out", "made")
    }


def test_a_prompt_that_leaves_the_model_no_room_for_its_answer_is_counted(ask: Any) -> None:
    found = ask("a.jsonl", [{"prompt": "Who? " * 200}, *ASKED[:1]], n=1)

    assert (found["unusable"], found["kept"]) == ({"too_long": 1}, 1)


def test_prompts_that_all_leave_no_room_are_one_line_that_says_so(ask: Any) -> None:
    with pytest.raises(BadData, match=r"kept: too_long 1\. .*Next: lower --max-new-tokens"):
        ask("a.jsonl", [{"prompt": "Who? " * 200}], n=1)


def test_filters_that_keep_nothing_can_be_loosened_without_asking_again(ask: Any) -> None:
    with pytest.raises(BadData, match=r"no answer to 7 prompts is kept: short 14. Kept: all answers in .*units"):
        ask("a.jsonl", min_tokens=6)

    assert ask("a.jsonl")["made"] == 0


@pytest.mark.parametrize(
    ("rows", "how", "kind", "message"),
    [
        (ASKED, {"seed": 3}, Mismatch, "belongs to other settings: generation.seed was 0, is 3. Kept: it as it is"),
        (ASKED, {"policy": "student"}, Mismatch, "belongs to other settings: filters.policy was , is student"),
        (ASKED[1:], {}, Mismatch, "belongs to other settings: prompts.sha256"),
        (ASKED, {"temperature": 0.0}, UsageError, "--temperature 0 gives the same answer 2 times"),
        ([{"text": "no turns"}], {}, UsageError, "no row fits any form; the rows have text"),
        ([{"text": "no turns"}], {"form": "text"}, UsageError, "rows of the form text have no prompt"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(
    rows: Any, how: Any, kind: type[XkdError], message: str, ask: Any, tmp_path: Path
) -> None:
    ask("a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()

    with pytest.raises(kind, match=re.escape(message)):
        ask("a.jsonl", rows, **how)

    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_file_that_is_somebody_elses_or_was_changed_is_not_overwritten(ask: Any, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", ["mine"])
    with pytest.raises(UsageError, match=r"own\.jsonl was not written by this command"):
        ask("own.jsonl")
    with pytest.raises(UsageError, match=r"is no \.jsonl file"):
        ask("own.txt")
    ask("a.jsonl")
    write_rows(tmp_path / "a.jsonl", ["mine"])
    with pytest.raises(Mismatch, match=r"a\.jsonl is not the file that .*a\.json describes"):
        ask("a.jsonl")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(Mismatch, match=r"a\.json does not describe answers"):
        ask("a.jsonl")
    assert own.read_text() == (tmp_path / "a.jsonl").read_text() == "mine\n"


def test_prompts_that_are_not_there_are_named(ask: Any) -> None:
    with pytest.raises(InputMissing, match=r"prompts\.jsonl"):
        ask("a.jsonl", None)
