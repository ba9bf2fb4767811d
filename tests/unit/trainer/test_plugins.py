"""Losses of other packages: found by name, refused where they clash or cannot be imported."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from xkd_schemas.errors import UsageError
from xkd_trainer.losses import registry
from xkd_trainer.losses.registry import loss_named, loss_names


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    registry.find_installed.cache_clear()
    yield
    registry.find_installed.cache_clear()


def declare(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [EntryPoint(name=name.rstrip("_"), value=value, group=registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


def test_without_packages_there_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch)
    assert loss_names() == tuple(registry.LOSSES)
    with pytest.raises(UsageError, match="'mat' is not a loss"):
        loss_named("mat")


def test_a_package_cannot_replace_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, sra="elsewhere:SRA")
    assert loss_named("sra") is registry.LOSSES["sra"]
    with pytest.raises(UsageError, match=r"elsewhere:SRA declares a loss named 'sra', which is one of XKD's"):
        loss_names()


def test_two_packages_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, mine="one:LOSS", mine_="two:LOSS")
    with pytest.raises(UsageError, match="'mine' is declared twice: one:LOSS and two:LOSS"):
        loss_named("mine")


def test_a_package_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_loss_of_a_package.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    declare(monkeypatch, broken="broken_loss_of_a_package:LOSS", gone="no_such_module_at_all:LOSS")
    with pytest.raises(UsageError, match=r"'broken' .* cannot be imported: ZeroDivisionError"):
        loss_named("broken")
    with pytest.raises(UsageError, match=r"'gone' .* cannot be imported: ModuleNotFoundError"):
        loss_named("gone")


def test_what_is_no_declaration_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, other="xkd_trainer.losses.sra:SRA", path="pathlib:Path")
    for name in ("other", "path"):
        with pytest.raises(UsageError, match=f"'{name}' .* is no Declaration named '{name}'"):
            loss_named(name)
