"""A student whose tokenizer the cache does not know: a command is printed, or run; a missing signal is never made."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import four_tokenizers
import small_cache
from forked import begun, wait_for
from small_cache import files_of, run_file
from xkd_pipeline.cli.app import app
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig
from xkd_schemas.errors import InputMissing, Mismatch, UsageError
from xkd_trainer.training import prepare
from xkd_trainer.training.prepare import set_up


def run_with(cache: Path, folder: Path, loss: str = "sra") -> RunConfig:
    """A student with a tokenizer that no table of the cache was made with."""
    four_tokenizers.tokenizer_of("sentencepiece").save_pretrained(folder / "pieces")
    return run_file(
        cache,
        student={
            "model": "new:llama,layers=2,width=16,heads=2", "tokenizer": str(folder / "pieces"), "name": "pieces",
            "max_tokens": 300,
        },
        train={"loss": loss},
    )  # fmt: skip


def test_without_a_table_a_command_is_printed_and_align_runs_just_that_and_shows_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, ran = small_cache.copied(tmp_path), list[list[str]]()
    before = files_of(cache)
    run = run_with(cache, tmp_path)

    def fork(command: list[str], *, stdout: int, text: bool, check: bool) -> SimpleNamespace:
        """The program without the seconds that it takes to start."""
        *python, program, words = *command[:4], command[4:]
        assert (python, stdout, text, check) == ([sys.executable, "-P", "-c"], subprocess.PIPE, True, False)
        ran.append(words)
        (ended,) = wait_for([begun(program, tmp_path / "said", *words)], [tmp_path / "said"])
        return SimpleNamespace(returncode=ended.code, stdout=ended.out)

    with pytest.raises(Mismatch, match=r"xkd-cache align .*--max-tokens 300.*--on-missing align") as caught:
        set_up(run, "")
    monkeypatch.setattr(prepare.subprocess, "run", fork)
    capsys.readouterr()
    ready = set_up(run, "", on_missing="align")

    assert ready.cache.students.name == "students/pieces"
    assert ran == [shlex.split(caught.value.fix.split("   ")[0])[1:]]
    assert capsys.readouterr().out.startswith("students/pieces: ")
    after = files_of(cache)
    assert {name for name in before if before[name] != after[name]} == {"README.md", "SHA256SUMS"}
    assert Table(cache, "students/pieces").manifest.spec["encoder"]["max_tokens"] == 300
    assert set_up(run, "", on_missing="align", quiet=True).cache.students.name == "students/pieces"
    assert capsys.readouterr().out == ""


def test_what_align_cannot_do_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small_cache.copied(tmp_path)
    run = run_with(cache, tmp_path)

    with pytest.raises(UsageError, match=r"--on-missing often: not known"):
        set_up(run, "", on_missing="often")
    ended = SimpleNamespace(returncode=78, stdout="")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.subprocess, "run", lambda *_, **__: ended)
        with pytest.raises(InputMissing, match=r"aligning ended with exit code 78.*xkd-cache align"):
            set_up(run, "", on_missing="align")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"several processes .*once, before training: xkd-cache align"):
        set_up(run, "", on_missing="align")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputMissing, match=r"pip install 'xkd-toolkit\[pipeline\]', then xkd-cache align"):
        set_up(run, "", on_missing="align")
    assert not (cache / "students/pieces").exists()


def test_a_cache_without_a_teacher_is_not_aligned(tmp_path: Path) -> None:
    run = run_with(tmp_path / "nothing", tmp_path)

    with pytest.raises(InputMissing, match=r"is not a folder"):
        set_up(run, "", on_missing="align")


def test_a_missing_signal_is_refused_with_the_command_that_adds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student: dict[str, object] = {"model": "new:llama,layers=2,width=16,heads=2"}
    run = small_cache.without_entropy(tmp_path, student=student, train={"loss": "dwa"})
    cache = tmp_path / "cache"
    capsys.readouterr()
    before = files_of(cache)
    with pytest.raises(UsageError, match=r"loss dwa needs entropy, .*xkd-cache add .*--signals entropy") as caught:
        set_up(run, "", on_missing="align")
    assert files_of(cache) == before

    typed = caught.value.fix.replace("PATH_OF_T", str(small_cache.made() / "teacher"))
    app([*shlex.split(typed)[1:], "--json"], standalone_mode=False)

    said = json.loads(capsys.readouterr().out)
    assert (said["table"], said["signals"], said["made"]) == ("signals/T.1", ["entropy"], 3)
    assert set_up(run, "").cache.beside[0].name == "signals/T.1"
    after = files_of(cache)
    assert {name for name in before if before[name] != after[name]} == {"README.md", "SHA256SUMS"}
