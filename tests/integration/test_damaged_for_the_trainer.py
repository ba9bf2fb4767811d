"""A bit flips in any file of a cache: the trainer names the file before it trains, or it never reads that file."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import small_cache
from damages import ROUNDS, SEED, flipped, targets
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import BadData, XkdError
from xkd_trainer.data.collate import batch_of
from xkd_trainer.models.loading import load_tokenizer
from xkd_trainer.training.prepare import set_up

FLIPS = ROUNDS // 6


def run_of(cache: Path) -> RunConfig:
    """A run that asks for every stored signal of the teacher, its head, its embeddings and its vocabulary."""
    student = {
        "model": "new:llama,layers=2,width=16,heads=2",
        "tokenizer": str(small_cache.made() / "student"),
        "name": "S",
    }
    return small_cache.run_file(cache, student=student, train={"loss": "mta+sra+dwa"})


def read_as_the_trainer(cache: Path) -> list[Any]:
    """Prepare, the batch of all rows, head, embeddings, and both tokenizers."""
    ready = set_up(run_of(cache), "", quiet=True)
    batch = batch_of(ready.cache, ready.cache.usable.tolist(), ready.wanted)
    head = ready.cache.head()
    found = [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)]
    ids = [ready.tokenizer.get_vocab(), load_tokenizer(str(ready.cache.teachers.folder / "tokenizer")).get_vocab()]
    return [*found, head.weight_VD, head.bias_V, ready.cache.embeddings(), *ids, batch.rows]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(*(torch.nan_to_num(side.float()) for side in (one, other)))  # padding may be NaN
    return bool(one == other)


def works_without(cache: Path, path: Path, whole: list[Any]) -> bool:
    """Whether the trainer reads the same where the file is not there: then it does not read the file."""
    content = path.read_bytes()
    path.unlink()
    try:
        return all(equal(a, b) for a, b in zip(read_as_the_trainer(cache), whole, strict=True))
    except XkdError:
        return False
    finally:
        path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_named_or_the_file_is_not_read(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    whole, chance, unread = read_as_the_trainer(cache), random.Random(SEED), set()
    for path in targets(cache):
        content = path.read_bytes()
        if works_without(cache, path, whole):
            unread.add(path.relative_to(cache).as_posix())
            continue
        for _ in range(FLIPS):
            path.write_bytes(flipped(content, chance.randrange(8 * len(content))))
            with pytest.raises(BadData) as caught:
                read_as_the_trainer(cache)
            assert path.name in caught.value.what
            assert caught.value.fix
        path.write_bytes(content)
    assert not [name for name in unread if name.endswith((".arrow", ".safetensors", "manifest.json"))]
    assert {name.rpartition("/tokenizer/")[0] for name in unread} <= {"", "students/S"}


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
        for damaged in (*(flipped(content, chance.randrange(8 * len(content))) for _ in range(FLIPS)), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(BadData, match=rf"{path.name} .*xkd-cache (repair|align) {cache} "):
                load_tokenizer(str(folder))
        path.write_bytes(content)
    (folder / "added_tokens.json").write_text('{"x": 3}')
    with pytest.raises(BadData, match=r"added_tokens\.json is a file that no manifest vouches for"):
        load_tokenizer(str(folder))
