"""What xkd-train and its eval say of a damaged or lying cache, checkpoint or student: one line, or nothing changes."""

import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import safetensors.torch
import torch

import small_cache
from damages import ROUNDS, SEED, flipped, resealed, targets
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData
from xkd_train import Ended, xkd_train
from xkd_trainer.models.loading import load_tokenizer

FLIPS = 5 * ROUNDS
READ: Final = ("NNNNN.arrow", "manifest.json", "head.safetensors", "embeddings.safetensors")
OUTCOMES: Final = ("refused", "harmless", "silent", "traceback")


Result = tuple[Ended, list[bytes]]  # how a command ended, and what it gave
TWO: Final = ("--steps", 2, "--batch-size", 2, "--save-every", 1)
GENERATE: Final = ("--limit", 1, "--seeds", 1, "--max-new-tokens", 3)


def train(cache: Path, out: Path, *words: object) -> Result:
    """With states, head, embeddings and vocabulary of the teacher; by default one step over all rows."""
    student = ("new:llama,layers=1,width=8,heads=2", "--student-tokenizer", small_cache.made() / "student")
    words = words or ("--steps", 1, "--batch-size", 12)
    ended = xkd_train("--shards", cache, "--student", *student, "--loss", "dwa", *words, "--out", out, "--json")
    left = (out / name for name in ("model.safetensors", "metrics.jsonl"))
    return ended, [path.read_bytes() for path in left if path.exists()]


def train_from(stopped: Path, cache: Path, out: Path, *words: object) -> Result:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(stopped, out)
    return train(cache, out, *words)


def train_again(cache: Path, out: Path) -> Result:
    """A finished student is left as it is; its metrics are not read."""
    ended, (weights, _) = train(cache, out, *TWO)
    return ended, [weights, ended.out.encode()]


def evaluate(student: Path, *words: object) -> Result:
    rows = small_cache.write_rows(student.parent / "rows.jsonl", small_cache.corpus_rows()[::4])  # of every shard one
    ended = xkd_train("eval", student, "--data", rows, *words, "--json")
    return ended, [ended.out.encode()]


def cases(root: Path) -> dict[str, tuple[list[Path], Callable[[], Result]]]:
    """Files in which bits are flipped, and a command that reads them."""
    cache, student, stopped, nothing = small_cache.copied(root), *(root / name for name in ("a", "stopped", "nothing"))
    nothing.mkdir()
    train(cache, student, *TWO)
    shutil.copytree(student / "checkpoints/step-00000001", stopped / "checkpoints/step-00000001")
    shutil.copy(student / "metrics.jsonl", stopped)
    shutil.rmtree(student / "checkpoints")
    return {
        "cache, training": (targets(cache), partial(train_from, nothing, cache, root / "b")),
        "cache, eval": (targets(cache), partial(evaluate, student, "--shards", cache, "--no-rouge")),
        "checkpoint, training": (targets(stopped), partial(train_from, stopped, cache, root / "b", *TWO)),
        "student, training again": (targets(student), partial(train_again, cache, student)),
        "student, eval": (targets(student), partial(evaluate, student, *GENERATE)),
    }


def outcome_of(path: Path, read: Callable[[], Result], whole: list[bytes]) -> str:
    try:
        ended, result = read()
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    if ended.code == 0:
        return "harmless" if result == whole else "silent"
    said = [line for line in ended.err.splitlines() if line.startswith("xkd-train: ")]
    return "refused" if len(said) == 1 and path.name in said[0] and "Next: " in said[0] else f"traceback: {ended}"


def table(counts: dict[tuple[str, str], Counter[str]]) -> str:
    rows = [(*key, sum(said.values()), *(said[name] for name in OUTCOMES)) for key, said in sorted(counts.items())]
    rows.append(("all", "", *(sum(row[at] for row in rows) for at in range(2, 7))))
    heads = (("read by", "file", "flips", *OUTCOMES), ("---",) * 7)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (*heads, *rows)) + "\n"


def test_no_flipped_bit_changes_what_training_and_eval_give_and_none_is_a_traceback(tmp_path: Path) -> None:
    chance, found = random.Random(SEED), cases(tmp_path)
    wholes = {name: read() for name, (_, read) in found.items()}
    assert {ended.code for ended, _ in wholes.values()} == {0}
    drawn = [(name, path) for name, (files, _) in found.items() for path in files if path.stat().st_size]
    drawn += [(name, path) for name, path in drawn if path.suffix != ".arrow"]
    chance.shuffle(drawn)
    counts: dict[tuple[str, str], Counter[str]] = {}
    wrong = []
    for number in range(FLIPS):
        name, path = drawn[number % len(drawn)]
        content = path.read_bytes()
        bit = chance.randrange(8 * len(content))
        path.write_bytes(flipped(content, bit))
        said = outcome_of(path, found[name][1], wholes[name][1])
        path.write_bytes(content)
        kind = "tokenizer/" if path.parent.name == "tokenizer" else re.sub(r"^\d{5}(-\w+)?", "NNNNN", path.name)
        counts.setdefault((name, kind), Counter())[said.partition(":")[0]] += 1
        if said not in ("refused", "harmless"):
            wrong.append((name, path.name, bit, said[:500]))
    sys.stdout.write(table(counts))  # pytest -s shows it
    assert not wrong, wrong[:5]
    assert not any(counts[key]["harmless"] for key in counts if key[0] == "cache, training" and key[1] in READ)


V, D = 1000, 32
TENSORS: Final = {
    "head.safetensors": [
        {"other": torch.zeros(V, D)}, {"weight": torch.zeros(V, D + 1)}, {"weight": torch.zeros(V + 1, D)},
        {"weight": torch.zeros(V, D, dtype=torch.int64)}, {"weight": torch.zeros(V, D), "bias": torch.zeros(3)}, {},
    ],
    "embeddings.safetensors": [{"weight": torch.zeros(V, D - 1)}, {"weight": torch.zeros(V)}],
}  # fmt: skip
LIES: Final = {
    "constants": [
        {"vocab_size": 0}, {"vocab_size": "3"}, {"hidden_size": D // 2}, {"num_layers": None}, {"softcap": "x"},
        {"tied": 1}, {"logit_scale": [1.0]}, {"hidden_std": -1.0}, {"embedding_std": None}, {"num_layers": 1 << 40},
    ],
    "spec": [{}, {"codec": "zip"}, {"signals": [3]}, {"signals": ["entropy"]}, {"schema": "1"}, {"encoder": {}}],
}  # fmt: skip


def outcome_of_teacher(cache: Path, says: dict[str, Any], name: str) -> str:
    """That of training on a cache whose teacher says this, with all digests made right."""
    root = resealed(cache, "teachers/T", lambda data: [data[key].update(new) for key, new in says.items()])
    resealed(cache, "students/S", lambda data: data["spec"].update(teacher_root=root))
    return outcome_of(cache / name, partial(train, cache, cache.parent / "out"), [])


@pytest.mark.parametrize(("name", "tensors"), [(name, one) for name, several in TENSORS.items() for one in several])
def test_tensors_that_do_not_fit_the_teacher_are_one_line(tmp_path: Path, name: str, tensors: Any) -> None:
    path = small_cache.copied(tmp_path) / "teachers/T" / name
    path.write_bytes(safetensors.torch.save(tensors) if tensors else b"no tensors")
    assert outcome_of_teacher(tmp_path / "cache", {"files": {name: sha256_of(path)}}, name) == "refused"


@pytest.mark.parametrize("lie", [{key: one} for key, several in LIES.items() for one in several], ids=str)
def test_a_manifest_that_cannot_be_that_of_a_teacher_is_one_line(tmp_path: Path, lie: dict[str, Any]) -> None:
    expected = "silent" if lie == {"spec": {}} else "refused"  # an honest one trains
    assert outcome_of_teacher(small_cache.copied(tmp_path), lie, "teachers/T") == expected


@pytest.mark.parametrize("manifest", ["whole", "damaged"])
@pytest.mark.parametrize("table", ["teachers/T", "students/S"])
def test_no_tokenizer_of_a_cache_is_loaded_unchecked(tmp_path: Path, table: str, manifest: str) -> None:
    cache = small_cache.copied(tmp_path)
    folder, chance = cache / table / "tokenizer", random.Random(SEED)
    again = {
        "teachers/T": f"repair {cache} --model PATH_OF_T",
        "students/S": f"align {cache} --student PATH_OF_ITS_TOKENIZER --name S",
    }
    if manifest == "damaged":  # then SHA256SUMS vouches
        (cache / table / "manifest.json").write_bytes(b"{")
    load_tokenizer(str(folder))
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for damaged in (*(flipped(content, chance.randrange(8 * len(content))) for _ in range(3)), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(BadData, match=rf"{path.name} .*xkd-cache {again[table]}"):
                load_tokenizer(str(folder))
        path.write_bytes(content)
    (folder / "added_tokens.json").write_text('{"x": 3}')
    with pytest.raises(BadData, match=r"added_tokens\.json is a file that no manifest vouches for"):
        load_tokenizer(str(folder))
