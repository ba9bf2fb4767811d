"""docs/adding-a-loss.md: the example is installed as a package, listed, captured for, and trained with."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import small_cache
from xkd_pipeline.cli.app import app as cache_app
from xkd_trainer.cli import app as train_app
from xkd_trainer.losses.ops.term import LossTerm
from xkd_trainer.losses.registry import find_installed

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-loss"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *command, "--target", folder, EXAMPLE], check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        find_installed.cache_clear()
        yield
    find_installed.cache_clear()


def test_it_is_listed_with_its_settings_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    train_app(["losses", "--json"], standalone_mode=False)

    listed = json.loads(capsys.readouterr().out)
    assert listed["sureness"]["needs"] == ["entropy"]
    assert listed["sureness"]["settings"] == {"scale": 1.0}
    assert "ce" in listed


def test_capture_stores_what_it_needs_and_a_student_is_trained(tmp_path: Path) -> None:
    cache, student = small_cache.copied(tmp_path), small_cache.gpt2(tmp_path / "gpt2")
    loss = ["--loss", "ce=0+sureness", "--set", "losses.sureness.scale=2", "--steps", "12", "--lr", "2e-3"]
    for app, *words in (
        (cache_app, "teacher", cache, "--model", small_cache.made() / "teacher", "--for", "sureness",
         "--name", "sure", "--dtype", "float32"),
        (cache_app, "align", cache, "--student", student, "--teacher", "sure", "--name", "G"),
        (train_app, "--shards", cache, "--student", student, "--student-table", "G", *loss,
         "--set", "train.log_every=1", "--out", tmp_path / "out"),
    ):  # fmt: skip
        app([*map(str, words)], standalone_mode=False)

    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all(line["sureness.entropy.count"] > 0 for line in lines)
    assert lines[-1]["sureness.entropy"] < 0.5 * lines[0]["sureness.entropy"]


def test_its_gradient_is_that_of_the_plain_formula() -> None:
    from xkd_sureness import squared_gaps

    student_E = torch.tensor([0.3, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
    made: LossTerm = squared_gaps(student_E, torch.tensor([0.1, 2.5, 1.5], dtype=torch.float64), 0.5)

    assert torch.allclose(made.total, torch.tensor((0.2**2 + 0.5**2) / 0.25, dtype=torch.float64))
    made.total.backward()
    assert torch.allclose(student_E.grad, torch.tensor([1.6, -4.0, 0.0], dtype=torch.float64))
