"""What data/demo.py runs and says, with commands that only pretend to run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_scripts import load_script
from xkd_schemas.config import load_run

ROOT = Path(__file__).parents[2]
demo = load_script("demo")
STAGE = {"stages": [{"made": 1}]}


def touched(path: Path) -> None:
    path.exists() or path.touch()


class Commands:
    """Every command ends well; a student's bits per byte follow from its folder's name."""

    def __init__(self, out: Path) -> None:
        self.out, self.ran = out, list[list[str]]()

    def assets(self, words: Any, **_given: Any) -> SimpleNamespace:
        (self.out / "teacher").mkdir(parents=True, exist_ok=True)
        touched(self.out / "teacher/model.safetensors")
        self.ran.append([str(word) for word in words])
        return SimpleNamespace(returncode=0)

    def started(self, words: list[str], **_given: Any) -> SimpleNamespace:
        words = words[1 if words[1] != "eval" else 0 :]
        self.ran.append(words)
        result: dict[str, Any] = {"made": 0}
        if "preprocess" in words:
            result = STAGE
        elif "--seed" in words:
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(exist_ok=True)
            touched(folder / "model.safetensors")
            result = {"terms": {"ce": 1.0}}
        elif "eval" in words:
            name = Path(words[2]).name
            bits = {"teacher": 1.0}.get(name, (2.4 if "-with-" in name else 2.6) + int(name[-1] == "1") / 100)
            result = {"bits_per_byte": bits} | ({"agreement": 9.0} if "--shards" in words else {})
        elif "pair" in words:
            per_word = {"teacher": {"per_word": 1.5}, "student": {"per_word": 1.7}}
            result = {"vocabulary": {"shared": 1, "student": 2}, "fertility": per_word, "exact_share": 0.5, "spans": 3}
        elif "plan" in words:
            result = dict.fromkeys(("tokens", "give_or_take", "bytes", "bytes_per_token", "shards", "memory_bytes"), 1)
        text = json.dumps(result)
        return SimpleNamespace(communicate=lambda: (text, None), returncode=0)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands(tmp_path / "demo")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(commands.out)])
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(
        run=commands.assets, Popen=commands.started, PIPE=subprocess.PIPE,
    ))  # fmt: skip
    return commands


def test_it_says_how_long_it_takes_and_shows_two_seeds_of_each_student(commands: Commands, capsys) -> None:
    demo.main()

    said = capsys.readouterr().out
    assert said.startswith("The demo takes about ")
    assert said.index("minutes here") < said.index("== teacher, text and tokenizer")
    losses = [words[words.index("--loss") + 1] for words in commands.ran if "--seed" in words]
    loss = load_run(ROOT / "runs/demo.toml").train.loss
    assert losses == ["ce", "ce", loss, loss]
    assert "| student without teacher | 2.605 (2.600, 2.610) | 9.0 % (9.0, 9.0) |" in said
    assert "| student with teacher | 2.405 (2.400, 2.410) |" in said
    assert "fewer bits than every student without: 0.200 in the mean" in said
    assert (commands.out / "report.md").read_text(encoding="utf-8").count("2.405") == 1


def test_an_evaluation_is_made_again_only_for_another_model(commands: Commands, monkeypatch) -> None:
    monkeypatch.setattr(demo, "probe", lambda: demo.PROBE)

    def evaluated() -> list[str]:
        commands.ran.clear()
        demo.main()
        return [Path(words[2]).name for words in commands.ran if "eval" in words[:2]]

    assert len(evaluated()) == 5
    for folder in commands.out.glob("student-*"):
        os.utime(folder / "model.safetensors", ns=(1, 1))
    assert len(evaluated()) == 4
    kept = json.loads((commands.out / "eval-teacher.json").read_text())
    (commands.out / "eval-teacher.json").write_text(json.dumps(kept | {"stamp": [*kept["stamp"], "--other"]}))
    assert "teacher" in evaluated()
