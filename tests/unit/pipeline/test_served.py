"""A teacher that runs elsewhere: what a server computed becomes a table, and what does not fit is refused by row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import small_cache
from small_cache import asked, made, refused, write_rows
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import teacher_of
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import UsageError
from xkd_trainer.data.cache import Cache
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.prepare import set_up

Row = dict[str, Any]


@pytest.fixture(scope="module")
@torch.no_grad()
def answers() -> list[Row]:
    """What a server says of each document of the small cache: ids, and log-probabilities of all but the first."""
    model, found = teacher_of(TeacherSettings(model=str(made() / "teacher"), dtype="float32")), []
    for row in Table(made() / "cache", "teachers/T"):
        ids_1T = torch.tensor(row["token_ids"].tolist())[None]
        log_p_TV = model(ids_1T).logits[0].log_softmax(-1)
        values = log_p_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].tolist()
        found.append({"doc_id": row["doc_id"], "token_ids": ids_1T[0].tolist(), "logprobs": [None, *values]})
    return found


def imported(cache: Path, rows: Path, *more: object, name: str = "V") -> Row:
    """What `xkd-cache import` says; the teacher's weights are not named."""
    named = () if "--model" in more else ("--tokenizer", made() / "teacher")
    code, said = asked("import", cache, rows, *named, "--name", name, "--template", "chat", *more)
    assert code == 0
    return said


@pytest.fixture(scope="module")
def served(answers: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a teacher that was imported, and one that was captured for ALM, each with its student."""
    folder = tmp_path_factory.mktemp("served")
    cache = small_cache.copied(folder)
    imported(cache, write_rows(folder / "rows.jsonl", answers))
    flags = ("--for", "alm", "--dtype", "float32", "--template", "chat")
    assert asked("teacher", cache, "--model", made() / "teacher", "--name", "C", *flags)[0] == 0
    for teacher in ("V", "C"):
        student = ("--student", made() / "student", "--teacher", teacher, "--name", f"of-{teacher}")
        assert asked("align", cache, *student)[0] == 0
    return cache


def run_of(cache: Path, loss: str = "ce=0+alm") -> RunConfig:
    student = {"model": "new:llama,layers=1,width=16", "tokenizer": str(made() / "student")}
    return RunConfig.model_validate({"cache": str(cache), "student": student, "train": {"loss": loss}})


@torch.no_grad()
def test_log_probabilities_of_a_server_give_alm_the_loss_of_a_capture(served: Path) -> None:
    found = []
    for table in ("of-V", "of-C"):
        ready = set_up(run_of(served), table)
        batch = batch_of(ready.cache, range(12), ready.wanted)
        found.append(float(ready.distiller(batch, ready.distiller.counts(batch), 0)[0]))

    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 0.01


def test_the_table_has_a_tokenizer_and_neither_head_nor_embeddings(served: Path) -> None:
    manifest = Table(served, "teachers/V").manifest

    assert "tokenizer.json" in manifest.files
    assert not [name for name in manifest.files if name.endswith(".safetensors")]
    assert asked("verify", served, "--level", "deep")[0] == 0
    cache = Cache(served, student="of-V")
    for read in (cache.head, cache.embeddings):
        with pytest.raises(UsageError, match=r"served teacher, whose head .* Next: use --loss alm"):
            read()


@pytest.mark.parametrize("loss", ["kl", "sra", "multilevelot"])
def test_a_loss_that_needs_states_is_refused_in_one_line(served: Path, loss: str) -> None:
    with pytest.raises(UsageError, match=rf"loss {loss} needs .*it holds target_logprob\). Next: of a served teacher"):
        set_up(run_of(served, loss), "of-V")


def as_vllm(rows: Sequence[Row]) -> list[Row]:
    """The same as vLLM writes it, another token beside the one that is there; documents are not named."""
    made = []
    for row in rows:
        entries: list[Any] = [None]
        for token, value in zip(row["token_ids"][1:], row["logprobs"][1:], strict=True):
            entries.append({str(token): {"logprob": value, "rank": 3}, str(token + 1): {"logprob": -0.1, "rank": 1}})
        made.append({"prompt_token_ids": row["token_ids"], "prompt_logprobs": entries, "text": ""})
    return made


def test_lines_parquet_and_vllms_form_give_the_same_shards(answers: list[Row], served: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(answers), tmp_path / "b.parquet", row_group_size=5)
    files = [write_rows(tmp_path / "a.jsonl", answers[::-1]), write_rows(tmp_path / "c.jsonl", as_vllm(answers))]

    for number, file in enumerate((*files, tmp_path / "b.parquet")):
        assert imported(served, file, name=f"same{number}")["refused"] == {}

    names = ("V", "same0", "same1", "same2")
    shards = [[c.sha256 for c in Table(served, f"teachers/{name}").manifest.commits] for name in names]
    assert shards == [shards[0]] * 4


def ended(row: Row, token: int, value: Any) -> Row:
    """The row with another last token and value."""
    return row | {"token_ids": [*row["token_ids"][:-1], token], "logprobs": [*row["logprobs"][:-1], value]}


def spoil(rows: list[Row]) -> list[tuple[Row | None, str, str]]:
    """A row for each document, the reason for which it is refused ("ok" if it is not), and a part of the detail."""
    vllm = as_vllm(rows)
    vllm[7]["prompt_logprobs"][-1] = {"7": -1.0}
    return [
        (rows[0], "ok", ""),
        (None, "not_imported", "no row is of this document"),
        (ended(rows[2], 7, -1.0), "other_tokens", "is 7, the tokenizer gives"),
        (
            {n: v[:-1] if n != "doc_id" else v for n, v in rows[3].items()},
            "other_tokens",
            "tokens, the tokenizer gives",
        ),
        (rows[4] | {"logprobs": rows[4]["logprobs"][:-1]}, "bad_values", "log-probabilities of"),
        (ended(rows[5], rows[5]["token_ids"][-1], None), "bad_values", "missing or not finite"),
        (ended(rows[6], rows[6]["token_ids"][-1], 0.5), "bad_values", "above 0"),
        (vllm[7], "other_tokens", "only 7 is rated there"),
        (ended(rows[8], rows[8]["token_ids"][-1], "x"), "bad_values", "'x' is no log-probability"),
        *((row, "ok", "") for row in rows[9:]),
    ]


def test_a_row_that_does_not_fit_is_refused_with_its_reason_and_the_others_are_whole(
    answers: list[Row], served: Path, tmp_path: Path
) -> None:
    rows = spoil(answers)
    more = answers[0] | {"doc_id": "0123456789abcdef"}
    file = write_rows(tmp_path / "rows.jsonl", [*(row for row, _, _ in rows if row), more])

    said = imported(served, file, "--max-reject", 1, name="spoilt")

    assert said["refused"] == {"bad_values": 4, "not_imported": 1, "other_tokens": 3}
    assert said["not_used"] == 1
    table, whole = Table(served, "teachers/spoilt"), Table(served, "teachers/V")
    assert [row["status"] for row in table] == [reason for _, reason, _ in rows]
    for ours, theirs in zip(table, whole, strict=True):
        assert ours["target_logprob"].tolist() == (theirs["target_logprob"].tolist() if ours["status"] == "ok" else [])
    lists = sorted((served / "teachers/spoilt/rejects").iterdir())
    listed = {row["doc_id"]: row for path in lists for row in map(json.loads, path.read_text().splitlines())}
    for (_, reason, detail), row in zip(rows, answers, strict=True):
        if reason != "ok":
            found = listed.pop(row["doc_id"])
            assert (found["reason"], detail in found["detail"]) == (reason, True)
    assert not listed
    assert asked("verify", served, "--level", "deep")[0] == 0


def test_a_first_row_that_does_not_fit_is_refused_alone(answers: list[Row], served: Path, tmp_path: Path) -> None:
    rows = [answers[0] | {"logprobs": [None]}, *answers[1:]]

    said = imported(served, write_rows(tmp_path / "rows.jsonl", rows), "--max-reject", 1, name="first")

    assert said["refused"] == {"bad_values": 1}


def test_more_refused_documents_than_allowed_are_one_line_with_the_first(
    answers: list[Row], served: Path, tmp_path: Path
) -> None:
    tokenizer = ("--tokenizer", made() / "teacher", "--name", "framed")
    file = write_rows(tmp_path / "rows.jsonl", answers)

    line = refused("import", served, file, *tokenizer, "--template", "none")

    assert "4 of 12 documents are refused, more than --max-reject 0.01" in line
    assert "tokens, the tokenizer gives" in line
    assert not (served / "teachers/framed/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "", "unknown file extension"),
        ("rows.jsonl", '{"doc_id": "a"\n', "byte 0: not JSON"),
        ("rows.jsonl", "[1]\n", "a row is an object, found list"),
        ("rows.jsonl", '{"text": "a"}\n', "a row has no doc_id, and no list of numbers in token_ids"),
        ("rows.jsonl", '{"doc_id": "a", "token_ids": [1]}\n', "first row cannot be used: no list in logprobs"),
        ("rows.jsonl", '{"doc_id": "a", "token_ids": [1], "logprobs": [null]}\n' * 2, "two rows are of a"),
        ("rows.parquet", "PAR1", "is broken"),
    ],
)
def test_a_file_that_is_none_is_one_line(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)

    assert said in refused("import", made() / "cache", tmp_path / name, "--tokenizer", made() / "teacher")


def test_with_the_model_at_hand_rows_are_recomputed_and_the_head_is_kept(
    answers: list[Row], served: Path, tmp_path: Path
) -> None:
    model = ("--model", made() / "teacher", "--recompute", 5)
    other = [row | {"logprobs": [None, *(value / 2 for value in row["logprobs"][1:])]} for row in answers]

    assert imported(served, write_rows(tmp_path / "rows.jsonl", answers), *model, name="M")["recomputed"] == 5
    assert Table(served, "teachers/M").manifest.constants["hidden_size"] == 32
    assert (served / "teachers/M/head.safetensors").is_file()
    file, named = write_rows(tmp_path / "other.jsonl", other), ("--name", "halved", "--template", "chat")
    line = refused("import", served, file, *model, *named)
    assert "target_logprob differs by 1.000" in line
    assert f"xkd-cache drop {served} teachers/halved" in line


def test_a_damaged_shard_is_made_again_of_the_same_rows_alone(answers: list[Row], tmp_path: Path) -> None:
    cache, file = small_cache.copied(tmp_path), write_rows(tmp_path / "rows.jsonl", answers)
    root = imported(cache, file)["root"]
    shard = Table(cache, "teachers/V").path(1)
    shard.write_bytes(b"x" * shard.stat().st_size)

    code, found = asked("repair", cache)

    assert (code, found["commands"][0].split(" ROWS")[0]) == (65, "xkd-cache import CACHE")
    assert imported(cache, file)["root"] == root
    other = write_rows(tmp_path / "other.jsonl", answers[::-1])
    named = ("--tokenizer", made() / "teacher", "--name", "V", "--template", "chat")
    assert "imported.rows" in refused("import", cache, other, *named)
