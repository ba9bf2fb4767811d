"""Folders of killed processes go with the next run; those of live ones, links and what has another name stay."""

import subprocess
import sys
from pathlib import Path

import pytest

from xkd_schemas.durable_files import own_folder, remove_ownerless

OWNER = """
import sys
from pathlib import Path
from xkd_schemas.durable_files import own_folder
with own_folder(Path(sys.argv[1]), ".tmp-x-") as folder:
    (folder / "half").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_stays_while_its_process_lives_and_goes_after_it_was_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        with own_folder(tmp_path, ".tmp-x-") as ours:
            remove_ownerless(tmp_path, ".tmp-x-")
            assert ours.is_dir()
            assert theirs.is_dir()
        assert not ours.exists()
        owner.kill()
    assert (theirs / "half").exists()
    remove_ownerless(tmp_path, ".tmp-x-")
    assert list(tmp_path.iterdir()) == []


def test_links_and_other_names_and_other_users_folders_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("elsewhere", ".tmp-y-1", ".tmp-x-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-x-link").symlink_to("elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: 12345)
        remove_ownerless(tmp_path, ".tmp-x-")
    assert (tmp_path / ".tmp-x-1").is_dir()
    remove_ownerless(tmp_path, ".tmp-x-")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", ".tmp-y-1", ".tmp-x-link"}


def test_a_folder_that_was_renamed_stays(tmp_path: Path) -> None:
    with own_folder(tmp_path, ".tmp-x-") as folder:
        folder.rename(tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
