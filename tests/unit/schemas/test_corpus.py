import copy
import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xkd_schemas.corpus import files
from xkd_schemas.corpus.sources import RawRow, Source, held_out_documents, open_source, read_documents
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData, InputMissing, Mismatch, UsageError, XkdError

ROWS = [{"prompt": f"question {n}?", "response": f"answer {n}"} for n in range(23)]


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder: Path, kind: str, rows: list) -> Path:
    path, packed = folder / f"rows{kind}", jsonl(rows)
    table = pa.Table.from_pylist(rows or ROWS).slice(0, len(rows))
    if kind == ".parquet":
        pq.write_table(table, path, row_group_size=5)
    elif kind.endswith(".arrow"):
        with (pa.ipc.new_file if "file" in kind else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif kind == "-saved":
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(path, num_shards=2 if rows else 1)
    else:
        pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": lambda content: pa.compress(content, "zstd", asbytes=True)}
        path.write_bytes(pack.get(kind, bytes)(packed))
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "-file.arrow", "-stream.arrow", "-saved"]


def objects(source: Source, first: int = 0) -> list[tuple[int, object]]:
    rows = ((row.line, row.content) for row in source.rows(first))
    return [(line, json.loads(content) if isinstance(content, bytes) else content) for line, content in rows]


def opened(path: Path, content: bytes, **options: object) -> Source:
    path.write_bytes(content)
    return open_source(str(path), **{"columns": {}, **options})


@pytest.mark.parametrize("batch_rows", [3, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows_from_any_row_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, batch_rows: int
) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", batch_rows)
    path = write(tmp_path, kind, ROWS)
    source = copy.deepcopy(open_source(str(path), columns={}))  # which holds no open file

    assert (source.num_rows, source.form) == (23, "prompt_response")
    assert path.is_dir() or source.digest == sha256_of(path)
    numbered = list(enumerate(ROWS, 1))
    assert all(objects(source, first) == numbered[first:] for first in range(25))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_source_has_no_rows(tmp_path: Path, kind: str) -> None:
    source = open_source(str(write(tmp_path, kind, [])), columns={})

    assert (source.num_rows, list(source.rows())) == (0, [])


def test_blank_lines_are_rows_only_before_the_last_row(tmp_path: Path) -> None:
    source = opened(tmp_path / "rows.jsonl", b'{"text": "a"}\n\n \n{"text": "b"}\n\n\r\n  \n')

    documents, rejected = read_documents("r", source.form, source.columns, list(source.rows()), max_chars=9)

    assert source.num_rows == 4
    assert [(d.line, d.text) for d in documents] == [(1, "a"), (4, "b")]
    assert [(r.line, r.reason) for r in rejected] == [(2, "blank"), (3, "blank")]


def test_carriage_returns_and_a_byte_order_mark_are_dropped_and_told(tmp_path: Path) -> None:
    source = opened(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"text": "a\\r"}\r\n{"text": "b"}\r\n')

    rows = list(source.rows())
    documents, rejected = read_documents("r", source.form, source.columns, rows, max_chars=9)

    assert rows[1].content == b'{"text": "b"}'
    assert [d.text for d in documents] == ["a\r", "b"]
    assert rejected == []
    assert source.describe().endswith("; 1 byte order mark dropped")


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("instruction prompt input output", "Alpaca/Dolly (instruction, input, output)"),
        ("instruction context response type", "Alpaca/Dolly (instruction, input=context, output=response)"),
        ("prompt response", "prompt and response (prompt, response)"),
        ("prompt completion", "prompt and response (prompt, response=completion)"),
        ("messages prompt response", "chat messages (messages); the rows also fit prompt_response"),
        ("text id", "plain text (text)"),
    ],
)
def test_the_form_is_found_and_shown(tmp_path: Path, keys: str, shown: str) -> None:
    source = opened(tmp_path / "train.jsonl", jsonl([dict.fromkeys(keys.split(), "a")]))

    assert source.describe() == f"{tmp_path}/train.jsonl: 1 rows, {shown}"


def test_rows_of_several_forms_are_told(tmp_path: Path) -> None:
    source = opened(tmp_path / "a.jsonl", jsonl([*ROWS, {"text": "x"}]))

    assert source.form == "prompt_response"
    assert source.describe().endswith("; 23 of the first 24 readable rows fit; the rows also fit text")


def test_mapped_columns_settle_the_form(tmp_path: Path) -> None:
    content = jsonl([{"question": "a", "answer": "b", "text": "c"}])

    source = opened(tmp_path / "a.jsonl", content, columns={"prompt": "question", "response": "answer"})

    assert source.form == "prompt_response"
    assert source.columns == {"prompt": "question", "response": "answer"}


def test_rows_that_fit_nothing_name_their_columns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no row fits any form; the rows have answer, question\. Next: say which"):
        opened(tmp_path / "a.jsonl", jsonl([{"question": "a", "answer": "b"}]))


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(UsageError, match="has an empty name"):
        open_source("", columns={})


def test_a_mapped_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    columns = {"prompt": "questoin", "response": "answer"}
    with pytest.raises(UsageError, match=r"no row has questoin; the rows have answer, question\. Next: say which"):
        opened(tmp_path / "a.jsonl", jsonl([{"question": "a", "answer": "b"}]), columns=columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sharegpt"}, "form 'sharegpt' is not known.*messages, alpaca, prompt_response, text"),
        ({"form": "alpaca"}, "no row fits alpaca"),
        ({"columns": {"question": "prompt"}}, "'question' is not a field"),
        ({"columns": {"prompt": "a", "output": "b"}}, "no form has all of prompt, output"),
        ({"columns": {"text": "a"}, "form": "alpaca"}, "'text' is not a field"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "a.jsonl", jsonl(ROWS), **options)


def test_a_source_without_any_readable_row_is_all_rejects(tmp_path: Path) -> None:
    source = opened(tmp_path / "a.jsonl", b"{\n[1]\nnull\n")

    documents, rejected = read_documents("a", source.form, source.columns, list(source.rows()), max_chars=9)

    assert (documents, len(rejected), source.num_rows) == ([], 3, 3)
    assert "no readable row to tell the form by" in source.describe()


def test_a_folder_is_read_in_the_order_of_names_and_links_are_counted(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "b").mkdir(parents=True)
    folder = tmp_path / "corpus"
    (folder / "b" / "2.jsonl").write_bytes(jsonl(ROWS[9:]))
    pq.write_table(pa.Table.from_pylist(ROWS[:9]), folder / "a.parquet")
    (folder / "notes.md").write_text("no rows")
    (folder / ".hidden.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "secret.jsonl").write_bytes(jsonl(ROWS))
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    os.mkfifo(folder / "pipe.jsonl")

    source = open_source(str(folder), columns={})

    assert objects(source) == list(enumerate(ROWS, 1))
    assert all(objects(source, first) == list(enumerate(ROWS, 1))[first:] for first in (5, 9, 12, 22, 23))
    assert source.describe().endswith("; 2 files; 2 links, pipes or devices left out; 2 other files left out")
    before = source.digest
    (folder / "a.parquet").rename(folder / "aa.parquet")
    assert open_source(str(folder), columns={}).digest != before


def test_a_saved_data_set_without_one_of_its_files_is_not_a_shorter_one(tmp_path: Path) -> None:
    path = write(tmp_path, "-saved", ROWS)
    (path / "data-00001-of-00002.arrow").unlink()

    with pytest.raises(InputMissing, match=r"lacks data-00001-of-00002\.arrow"):
        open_source(str(path), columns={})


def test_several_splits_must_be_told_apart(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "d")

    with pytest.raises(UsageError, match=r"holds several splits: test, train\. Next: name one"):
        open_source(str(tmp_path / "d"), columns={})
    assert open_source(str(tmp_path / "d" / "train"), columns={}).num_rows == 23


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_file_that_changed_after_counting_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ROWS)
    source = open_source(str(path), columns={})
    write(tmp_path, kind, ROWS[:-1])

    with pytest.raises(Mismatch, match="was changed after it was counted"):
        list(source.rows())
    path.unlink()
    with pytest.raises(InputMissing, match="put the file back"):
        list(source.rows())


def test_what_is_not_a_regular_readable_file_of_rows_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "empty").mkdir()

    for name in ("gone.jsonl", "pipe.jsonl", "loop.jsonl", "empty", "gone.jsonl/rows.jsonl"):
        with pytest.raises(InputMissing, match=name):
            open_source(str(tmp_path / name), columns={})
    with pytest.raises(UsageError, match="unknown file extension"):
        opened(tmp_path / "rows.csv", b"a,b\n")
    with pytest.raises(UsageError, match=r"jq -c '\.\[\]' rows\.json"):
        opened(tmp_path / "rows.json", json.dumps(ROWS).encode())


def test_an_arrow_stream_that_was_cut_off_is_bad_data(tmp_path: Path) -> None:
    whole = write(tmp_path, "-stream.arrow", ROWS).read_bytes()

    with pytest.raises(BadData, match="has no end"):
        opened(tmp_path / "cut.arrow", whole[:-8])  # which a reader takes for a complete table


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from([".parquet", "-file.arrow", "-stream.arrow"]))
def test_a_damaged_table_is_an_error_that_names_it(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    whole = write(tmp_path, kind, ROWS).read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))

    with pytest.raises(XkdError, match="damaged"):
        opened(tmp_path / f"damaged.{kind.split('.')[1]}", whole[:cut])


def test_text_that_is_not_utf8_in_a_table_costs_only_its_own_row(tmp_path: Path) -> None:
    good = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
    broken = pa.StringArray.from_buffers(3, good.buffers()[1], good.buffers()[2])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")

    source = open_source(str(tmp_path / "a.parquet"), columns={})
    documents, rejected = read_documents("a", source.form, source.columns, list(source.rows()), max_chars=9)

    assert [d.text for d in documents] == ["one", "three"]
    assert [(r.line, r.reason) for r in rejected] == [(2, "bad_utf8")]


def test_only_the_needed_columns_of_a_table_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "pixels": list(range(99))}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    source = open_source(str(tmp_path / "a.parquet"), columns={})

    assert list(source.rows()) == [RawRow(line=1, content={"text": "a"})]


def test_tools_and_system_turn_beside_the_messages_are_read_from_tables_too(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"x": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": calls}],
         "tools": [{"name": "add"}], "system": "s", "source": "x"}
        for calls in ([call], [{"function": {"name": "sub", "arguments": {"y": 1}}}])
    ]  # fmt: skip
    source = open_source(str(write(tmp_path, ".parquet", rows)), columns={})

    documents, rejected = read_documents("a", source.form, source.columns, list(source.rows()))

    assert not rejected
    assert documents[0].text == 'sab{"name": "add", "arguments": {"x": 1}}'
    assert json.loads(documents[0].messages)["tools"] == [{"name": "add"}]


def hub_of(monkeypatch: pytest.MonkeyPatch, rows: Callable[[], Iterator[object]]) -> list[tuple[object, ...]]:
    """A hub on which every data set streams these rows; what it was asked for."""
    asked: list[tuple[object, ...]] = []

    def commit(_: object, name: str, *, revision: str | None = None) -> SimpleNamespace:
        asked.append((name, revision))
        return SimpleNamespace(sha=f"commit-of-{revision}")

    def load(name: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, subset, split, revision, streaming))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", commit)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherError(Exception): ...

    def unreachable(*_: object, **__: object) -> None:
        raise OtherError("Couldn't reach 'no/such' on the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)

    with pytest.raises(InputMissing, match=r"no/such:dev: there is no such file or folder here, and the hub .* reach"):
        open_source("no/such:dev", columns={})


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a/b", ("a/b", None, "train", "commit-of-None", True)),
        ("a/b:dev", ("a/b", None, "dev", "commit-of-None", True)),
        ("a/b:main:dev", ("a/b", "main", "dev", "commit-of-None", True)),
        ("b@v1.0", ("b", None, "train", "commit-of-v1.0", True)),
        ("a/b@v1:sub-set:dev", ("a/b", "sub-set", "dev", "commit-of-v1", True)),
    ],
)
def test_revision_subset_and_split_of_a_data_set_are_named_and_its_commit_is_pinned(
    monkeypatch: pytest.MonkeyPatch, name: str, wanted: tuple[object, ...]
) -> None:
    asked = hub_of(monkeypatch, lambda: iter(ROWS))

    source = open_source(name, columns={})

    assert objects(source, 20) == list(enumerate(ROWS, 1))[20:]
    assert set(asked[1:]) == {wanted}
    assert f"split {wanted[2]} from the hub, streamed, at commit {wanted[3]}" in source.describe()
    others = {open_source(other, columns={}).digest for other in ("other", "a/b:x:y")}
    assert len({source.digest, *others}) == 3


def test_a_subset_that_is_not_named_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_subset() -> Iterator[object]:
        raise ValueError("Config name is missing. Please pick one among the available configs: ['x', 'y']")
        yield

    hub_of(monkeypatch, without_subset)

    with pytest.raises(UsageError, match=r"'x', 'y'.*NAME@REVISION:SUBSET:SPLIT"):
        open_source("a/b", columns={})


def test_no_more_than_a_few_rows_of_a_data_set_on_the_hub_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0

    class Text(str):
        def __del__(self) -> None:
            alive.discard(id(self))

    def rows() -> Iterator[dict[str, str]]:
        nonlocal most
        for number in range(3000):
            text = Text(number)
            alive.add(id(text))
            most = max(most, len(alive))
            yield {"text": text}

    hub_of(monkeypatch, rows)
    source = open_source("a/b", columns={})

    assert source.num_rows == sum(1 for _ in source.rows()) == 3000
    assert most < 200


HELD = [{"prompt": "Who?", "response": "The keeper."}, {"prompt": "Where?", "response": "At home."}]


def test_held_out_rows_come_in_order_with_all_references_by_line_and_unusable_ones_are_counted(tmp_path: Path) -> None:
    several = {"prompt": "Why?", "response": ["Duty.", "A lamp."]}
    (tmp_path / "dev.jsonl").write_bytes(jsonl(HELD[:1]) + b'{broken\n{"prompt": "x"}\n' + jsonl([HELD[1], several]))

    documents, rejected, references = held_out_documents(tmp_path / "dev.jsonl")

    assert [(d.text, d.line) for d in documents] == [("Who?The keeper.", 1), ("Where?At home.", 4), ("Why?Duty.", 5)]
    assert {d.source for d in documents} == {"dev.jsonl"}
    assert [row.line for row in rejected] == [2, 3]
    assert references == {5: ["Duty.", "A lamp."]}


def test_a_held_out_file_without_rows_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_bytes(b"\n  \n")

    with pytest.raises(BadData, match=r"dev.jsonl has no rows"):
        held_out_documents(tmp_path / "dev.jsonl")
