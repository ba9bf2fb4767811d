"""Plan, commit and manifest: read back as written, or refused with an exit code, whatever is in the file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xkd_schemas.cache.manifest import (
    Commit,
    Manifest,
    Plan,
    Unit,
    differences,
    is_whole,
    read_record,
    refuse_differences,
    seal_table,
    to_json,
)
from xkd_schemas.durable_files import canonical, digest
from xkd_schemas.errors import BadData, InputMissing, Mismatch

PLAN = Plan(table="documents", spec={"a": {"b": 1}}, units=(Unit(source="x.jsonl", first=0, rows=3),))
COMMIT = Commit(unit=0, file="00000-ab.arrow", rows=3, size=9, sha256="0", frame_xxh3="1", batches=())
MANIFEST = seal_table(PLAN, (COMMIT,), {"std": 0.5}, {"head.safetensors": "0"})
RECORDS = {"plan": PLAN, "commit": COMMIT, "manifest": MANIFEST}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_record_is_read_or_refused_and_never_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    record = data.draw(st.sampled_from(list(RECORDS.values())))
    content = bytearray(to_json(record))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("cut", "byte", "insert")))
        if kind == "cut":
            content = content[:at] or bytearray(b"\0")
        elif kind == "byte":
            content[at] = data.draw(st.integers(0, 255))
        else:
            content[at:at] = data.draw(st.binary(max_size=8))
    path = tmp_path / "r"
    path.write_bytes(content)

    try:
        read = read_record(path, type(record))
    except (BadData, Mismatch):
        return
    assert not isinstance(read, Manifest) or read == record or not is_whole(read)


ODD = [
    b"", b"\0" * 64, b"{}", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"min_reader": null}',
    b'{"min_reader": []}', b'{"min_reader": 1e999}', b'{"min_reader": "x"}', b'{"min_reader": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def commit_with(**fields: object) -> bytes:
    return json.dumps({k: v for k, v in json.loads(to_json(COMMIT)).items() if k != "digest"} | fields).encode()


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        *((kind, content, "") for kind in (Plan, Commit, Manifest) for content in ODD),
        *((Manifest, to_json(MANIFEST).replace(b"0.5", n), "no JSON num") for n in (b"NaN", b"Infinity", b"1e999")),
        *((Commit, commit_with(file=name), "file") for name in ("../x.arrow", "a/b.arrow", "/x.arrow", ".x", "")),
        (Commit, commit_with(extra=1), "extra"),
        (Manifest, to_json(MANIFEST).replace(b"0.5", b"1.0"), "it does not match its own digest"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_record_is_bad_data(tmp_path: Path, kind: Any, content: bytes, said: str) -> None:
    (tmp_path / "r.json").write_bytes(content)

    with pytest.raises(BadData, match=f"r.json cannot be read as {kind.__name__.lower()}: .*{said}"):
        read_record(tmp_path / "r.json", kind)


def test_a_folder_in_place_of_a_record_is_missing_input(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()

    with pytest.raises(InputMissing, match=r"plan.json cannot be read: Is a directory"):
        read_record(tmp_path / "plan.json", Plan)


def test_a_newer_format_asks_for_an_upgrade_and_a_table_that_grew_is_made_again(tmp_path: Path) -> None:
    newer = to_json(PLAN.model_copy(update={"min_reader": 3}))
    grown = {**json.loads(to_json(MANIFEST)), "format": 2, "min_reader": 2, "earlier": [{"units": 1}]}

    for kind, content, said in (
        (Plan, newer, r"r: format 3, this program reads up to 1. Next: upgrade xkd-toolkit"),
        (Manifest, json.dumps(grown).encode(), r"documents were added.*preprocess RUN.toml.*--shards a/ --shards b/"),
    ):
        (tmp_path / "r").write_bytes(content)
        with pytest.raises(Mismatch, match=said):
            read_record(tmp_path / "r", kind)


@pytest.mark.parametrize(
    "change",
    [
        {"table": "x"}, {"spec": {"a": 2}}, {"commits": ()}, {"constants": {"std": 0.25}}, {"files": {}},
        {"spec_id": "0"}, {"root": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_covers_everything_it_says(change: dict[str, Any]) -> None:
    assert is_whole(MANIFEST)
    assert not is_whole(MANIFEST.model_copy(update=change))


def test_equal_values_have_one_canonical_form() -> None:
    assert canonical({"b": [1, 2.5], "a": "é"}) == canonical({"a": "é", "b": [1, 2.5]})
    assert canonical({"b": [1, 2.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    assert digest({"a": 1}) != digest({"a": "1"})


def test_every_differing_field_is_listed_with_both_values(tmp_path: Path) -> None:
    ours = {"dtype": "float32", "weights": {"a": "1", "b": "2"}, "same": 1, "signals": ["x"]}
    theirs = {"dtype": "bfloat16", "weights": {"a": "1", "b": "3"}, "same": 1, "extra": True}

    assert differences(ours, theirs) == [
        ("dtype", "float32", "bfloat16"), ("extra", "absent", "true"), ("signals", '["x"]', "absent"),
        ("weights.b", "2", "3"),
    ]  # fmt: skip
    with pytest.raises(Mismatch) as caught:
        refuse_differences(tmp_path, ours, theirs, advice="say so")
    said = "dtype: cache has bfloat16, this run has float32; extra: cache has true, this run has absent"
    assert said in str(caught.value)
    assert str(caught.value).endswith("Kept: the cache as it is. Next: say so")


def test_of_two_lists_the_items_that_differ_are_shown() -> None:
    long = [f"span_geometry@{n}:phrase" for n in range(9)]
    corpus = [{"name": "a" * 80, "form": "text"}, {"name": "b", "form": "text"}]
    other = [corpus[0], {"name": "b", "form": "alpaca"}]

    assert differences({"signals": [*long, "x"], "c": [1, 2]}, {"signals": long, "c": [2, 1]}) == [
        ("c", "[1, 2]", "[2, 1]"),
        ("signals", '["x"]', "nothing else"),
    ]
    assert differences({"corpus": corpus}, {"corpus": other}) == [("corpus.1.form", "text", "alpaca")]
    assert differences({"corpus": corpus}, {"corpus": corpus[:1]}) == [("corpus", '["b"]', "nothing else")]
    assert differences({"a": [{"k": 1}]}, {"a": []}) == [("a", '[{"k": 1}]', "nothing else")]


def test_a_long_list_of_differences_is_cut_and_counted(tmp_path: Path) -> None:
    names = [f"f{n}" for n in range(10)]

    with pytest.raises(Mismatch, match=r"f5: cache has 1{57}\.\.\., this run has 0 \(and 4 more\)"):
        refuse_differences(tmp_path, dict.fromkeys(names, 0), dict.fromkeys(names, "1" * 80), advice="")


def test_a_changed_number_in_a_commit_is_found_before_there_is_a_manifest(tmp_path: Path) -> None:
    content = to_json(COMMIT)
    (tmp_path / "r").write_bytes(content)
    assert read_record(tmp_path / "r", Commit) == COMMIT
    for at in [i for i, byte in enumerate(content) if chr(byte).isdigit()]:
        changed = bytearray(content)
        changed[at] = ord("1") if changed[at] != ord("1") else ord("2")
        (tmp_path / "r").write_bytes(changed)
        with pytest.raises(BadData):
            read_record(tmp_path / "r", Commit)
    (tmp_path / "r").write_bytes(commit_with())
    assert read_record(tmp_path / "r", Commit) == COMMIT
