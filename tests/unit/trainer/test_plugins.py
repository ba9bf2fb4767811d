"""Losses of other packages: found by name, refused where they clash or cannot be imported."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from xkd_schemas.errors import UsageError
from xkd_trainer.losses import registry
from xkd_trainer.losses.registry import loss_named, loss_names
from xkd_trainer.losses.sra import SRA


def declare(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [EntryPoint(name=name.rstrip("_"), value=value, group=registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    monkeypatch.setattr(registry, "find_installed", registry.find_installed.__wrapped__)  # without its memory


def test_without_packages_there_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch)
    assert loss_names() == tuple(registry.LOSSES)
    assert loss_names() == tuple(loss_named(name).name for name in registry.LOSSES)
    with pytest.raises(UsageError, match="'mat' is not a loss"):
        loss_named("mat")


def test_a_package_cannot_replace_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, sra="elsewhere:SRA")
    assert loss_named("sra") is SRA
    with pytest.raises(UsageError, match=r"elsewhere:SRA declares a loss named 'sra', which is one of XKD's"):
        loss_names()


@pytest.mark.parametrize(
    ("name", "points", "said"),
    [
        ("mine", {"mine": "one:LOSS", "mine_": "two:LOSS"}, "is declared twice: one:LOSS and two:LOSS"),
        ("broken", {"broken": "broken_loss_of_a_package:LOSS"}, ".* cannot be imported: ZeroDivisionError"),
        ("gone", {"gone": "no_such_module_at_all:LOSS"}, ".* cannot be imported: ModuleNotFoundError"),
        ("other", {"other": "xkd_trainer.losses.sra:SRA"}, ".* is no Declaration named 'other'"),
        ("path", {"path": "pathlib:Path"}, ".* is no Declaration named 'path'"),
    ],
)
def test_a_package_that_breaks_or_declares_something_else_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, points: dict[str, str], said: str
) -> None:
    (tmp_path / "broken_loss_of_a_package.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    declare(monkeypatch, **points)
    with pytest.raises(UsageError, match=f"'{name}' {said}"):
        loss_named(name)
