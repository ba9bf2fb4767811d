"""What xkd-train and its eval say of a damaged or lying cache, checkpoint or student: one line, or nothing changes."""

import contextlib
import io
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import safetensors.torch
import torch

import small_cache
from damages import ROUNDS, SEED, flipped, resealed, targets
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData
from xkd_trainer.cli import main
from xkd_trainer.models.loading import load_tokenizer

FLIPS = 5 * ROUNDS
OUTCOMES: Final = ("refused", "harmless", "silent", "traceback")


class Ended(NamedTuple):
    code: object
    out: str
    err: str


def xkd_train(*words: object) -> Ended:
    """The command in this process; whatever is no exit is raised."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["xkd-train", *map(str, words), "--json"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        return Ended(ended.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("main() leaves with an exit code")


def train(cache: Path, out: Path, *words: object) -> tuple[Ended, list[bytes]]:
    """One step over all rows with states, head, embeddings and vocabulary of the teacher; and what was left."""
    student = ("new:llama,layers=1,width=8,heads=2", "--student-tokenizer", small_cache.made() / "student")
    words = words or ("--steps", 1, "--batch-size", 12)
    ended = xkd_train("--shards", cache, "--student", *student, "--loss", "dwa", *words, "--out", out)
    left = [path.read_bytes() for name in ("model.safetensors", "metrics.jsonl") if (path := out / name).exists()]
    return ended, left


def train_anew(cache: Path, out: Path) -> tuple[Ended, list[bytes]]:
    shutil.rmtree(out, ignore_errors=True)
    return train(cache, out)


TWO: Final = ("--steps", 2, "--batch-size", 2, "--save-every", 1)


def resume(cache: Path, out: Path, stopped: Path) -> tuple[Ended, list[bytes]]:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(stopped, out)
    return train(cache, out, *TWO)


def train_again(cache: Path, out: Path) -> tuple[Ended, list[bytes]]:
    """A finished student is left as it is; its metrics are not read."""
    ended, (weights, _) = train(cache, out, *TWO)
    return ended, [weights, ended.out.encode()]


def evaluate(student: Path, *words: object) -> tuple[Ended, list[bytes]]:
    rows = small_cache.write_rows(student.parent / "rows.jsonl", small_cache.corpus_rows()[::4])  # of every shard one
    ended = xkd_train("eval", student, "--data", rows, *words)
    return ended, [ended.out.encode()]


GENERATE: Final = ("--limit", 1, "--seeds", 1, "--max-new-tokens", 3)


class Case(NamedTuple):
    """Files in which bits are flipped, and a command that reads them: how it ended, and its result."""

    files: list[Path]
    read: Callable[[], tuple[Ended, list[bytes]]]


def cases(root: Path) -> dict[str, Case]:
    cache, student, stopped = small_cache.copied(root), root / "student", root / "stopped"
    train(cache, student, *TWO)
    shutil.copytree(student / "checkpoints/step-00000001", stopped / "checkpoints/step-00000001")
    shutil.copy(student / "metrics.jsonl", stopped)
    shutil.rmtree(student / "checkpoints")
    return {
        "cache, training": Case(targets(cache), partial(train_anew, cache, root / "out")),
        "cache, eval": Case(targets(cache), partial(evaluate, student, "--shards", cache, "--no-rouge")),
        "checkpoint, training": Case(targets(stopped), partial(resume, cache, root / "out", stopped)),
        "student, training again": Case(targets(student), partial(train_again, cache, student)),
        "student, eval": Case(targets(student), partial(evaluate, student, *GENERATE)),
    }


def outcome_of(path: Path, read: Callable[[], tuple[Ended, list[bytes]]], whole: list[bytes]) -> str:
    try:
        ended, result = read()
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    if ended.code == 0:
        return "harmless" if result == whole else "silent"
    said = [line for line in ended.err.splitlines() if line.startswith("xkd-train: ")]
    return "refused" if len(said) == 1 and path.name in said[0] and "Next: " in said[0] else f"traceback: {ended}"


def kind_of(path: Path) -> str:
    return "tokenizer/" if path.parent.name == "tokenizer" else re.sub(r"^\d{5}(-\w+)?", "NNNNN", path.name)


def table(counts: dict[tuple[str, str], Counter[str]]) -> str:
    rows = [(*key, sum(said.values()), *(said[name] for name in OUTCOMES)) for key, said in sorted(counts.items())]
    rows.append(("all", "", *(sum(row[at] for row in rows) for at in range(2, 7))))
    heads = (("read by", "file", "flips", *OUTCOMES), ("---",) * 7)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (*heads, *rows))


def test_no_flipped_bit_changes_what_training_and_eval_give_and_none_is_a_traceback(tmp_path: Path) -> None:
    chance, found = random.Random(SEED), cases(tmp_path)
    wholes = {name: case.read() for name, case in found.items()}
    assert {name: ended.code for name, (ended, _) in wholes.items()} == dict.fromkeys(found, 0)
    drawn = [(name, path) for name, case in found.items() for path in case.files if path.stat().st_size]
    drawn += [(name, path) for name, path in drawn if path.suffix != ".arrow"]
    chance.shuffle(drawn)
    counts: dict[tuple[str, str], Counter[str]] = {}
    wrong = []
    for number in range(FLIPS):
        name, path = drawn[number % len(drawn)]
        content = path.read_bytes()
        bit = chance.randrange(8 * len(content))
        path.write_bytes(flipped(content, bit))
        said = outcome_of(path, found[name].read, wholes[name][1])
        path.write_bytes(content)
        counts.setdefault((name, kind_of(path)), Counter())[said.partition(":")[0]] += 1
        if said not in ("refused", "harmless"):
            wrong.append((name, path.name, bit, said[:500]))
    sys.stdout.write(table(counts) + "\n")  # pytest -s shows it
    assert not wrong, wrong[:5]


# Right digests, hostile content

V, D = 1000, 32
TENSORS: Final = {
    "head.safetensors": [
        {"other": torch.zeros(V, D)}, {"weight": torch.zeros(V, D + 1)}, {"weight": torch.zeros(V + 1, D)},
        {"weight": torch.zeros(V, D, dtype=torch.int64)}, {"weight": torch.zeros(V, D), "bias": torch.zeros(3)}, {},
    ],
    "embeddings.safetensors": [{"weight": torch.zeros(V, D - 1)}, {"weight": torch.zeros(V)}],
}  # fmt: skip
CONSTANTS: Final = [
    {"vocab_size": 0}, {"vocab_size": "3"}, {"hidden_size": D // 2}, {"num_layers": None}, {"softcap": "x"},
    {"tied": 1}, {"logit_scale": [1.0]}, {"hidden_std": -1.0}, {"embedding_std": None}, {"num_layers": 1 << 40},
]  # fmt: skip


def refused(cache: Path, teacher: dict[str, Any], name: str, out: Path) -> str:
    """The one line of training on a cache whose teacher says this, with all digests made right."""
    root = resealed(cache, "teachers/T", lambda data: [data[key].update(new) for key, new in teacher.items()])
    resealed(cache, "students/S", lambda data: data["spec"].update(teacher_root=root))
    said = outcome_of(cache / name, partial(train, cache, out), [])
    return "" if said == "refused" else said


def test_tensors_that_do_not_fit_the_teacher_are_one_line(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    for name, several in TENSORS.items():
        path = cache / "teachers/T" / name
        whole = path.read_bytes()
        for tensors in several:
            path.write_bytes(safetensors.torch.save(tensors) if tensors else b"no tensors")
            assert not refused(cache, {"files": {name: sha256_of(path)}}, name, tmp_path / "out"), (
                name,
                tensors.keys(),
            )
        path.write_bytes(whole)
        assert refused(cache, {"files": {name: sha256_of(path)}}, name, tmp_path / "out").startswith("silent")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_constants_that_are_none_of_a_teacher_are_one_line(tmp_path: Path, constants: dict[str, Any]) -> None:
    name = "00000" if constants == {"hidden_size": D // 2} else "manifest.json"
    assert refused(small_cache.copied(tmp_path), {"constants": constants}, name, tmp_path / "out") == ""


@pytest.mark.parametrize("manifest", ["whole", "damaged"])
@pytest.mark.parametrize("table", ["teachers/T", "students/S"])
def test_no_tokenizer_of_a_cache_is_loaded_unchecked(tmp_path: Path, table: str, manifest: str) -> None:
    cache = small_cache.copied(tmp_path)
    folder, chance = cache / table / "tokenizer", random.Random(SEED)
    if manifest == "damaged":  # then SHA256SUMS vouches
        (cache / table / "manifest.json").write_bytes(b"{")
    load_tokenizer(str(folder))
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for damaged in (*(flipped(content, chance.randrange(8 * len(content))) for _ in range(3)), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(BadData, match=rf"{path.name} .*xkd-cache (repair|align) {cache} "):
                load_tokenizer(str(folder))
        path.write_bytes(content)
    (folder / "added_tokens.json").write_text('{"x": 3}')
    with pytest.raises(BadData, match=r"added_tokens\.json is a file that no manifest vouches for"):
        load_tokenizer(str(folder))
