"""The finished student as others take it: its card, what it says to a prompt, and its way to a hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models as tiny
from xkd_pipeline.stages import align_stage
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.config import RunConfig
from xkd_train import xkd_train
from xkd_trainer.training import card
from xkd_trainer.training.card import card_text, command_of
from xkd_trainer.training.prepare import set_up

TOKEN = "hf_secretsecret"
NASTY = "a|b\n---\n```\n# Owned <script>x</script>\n</details>"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How a student of one step was trained, whose start has a chat template and settings without do_sample."""
    root = tmp_path_factory.mktemp("card")
    shutil.copytree(tiny.tiny_cache().student, root / "start")
    (root / "start" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    path = root / "start" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}))
    shutil.copytree(tiny.tiny_cache().cache, root / "cache")
    own = tiny.tiny_cache().run(
        cache=str(root / "cache"), student__model=str(root / "start"), student__template="none"
    )
    align_stage(own.model_copy(update={"student": own.student.model_copy(update={"name": "chat"})}), Workers())
    found = f"--shards {root}/cache --student {root}/start --out {root}/out --loss sra --steps 1".split()
    found += ["--batch-size", "2", "--set", "losses.sra.cos=0.5"]
    ended = xkd_train(*found)
    assert ended.code == 0, ended.err
    return found


@pytest.fixture
def out(flags: list[str], tmp_path: Path) -> Path:
    """One's own copy of the finished student."""
    return Path(shutil.copytree(flags[flags.index("--out") + 1], tmp_path / "out"))


def test_the_finished_student_keeps_chat_template_and_settings_of_generation(out: Path) -> None:
    assert AutoTokenizer.from_pretrained(out).chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (config.temperature, config.do_sample) == (0.6, True)


def test_the_card_says_how_the_student_came_about_and_may_be_edited(out: Path, flags: list[str]) -> None:
    text = (out / "README.md").read_text()
    shown = ModelCard(text)
    run = json.loads((out / "xkd.json").read_text())["run"]

    assert (shown.data.library_name, shown.data.base_model) == ("transformers", None)
    assert run["cache"] in text
    assert '"cos": 0.5' in text
    assert '"corpus.jsonl"' in text
    assert "--loss sra --steps 1" in text
    (out / "README.md").write_text(f"{text}\nMine.\n")
    assert xkd_train(*flags).code == 0
    assert xkd_train("eval", out, "--data", tiny.tiny_cache().corpus, "--no-rouge", "--card").code == 0
    assert '"bits_per_byte": ' in (out / "README.md").read_text()
    assert "Not measured yet" not in (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    assert "no place for an evaluation" in xkd_train(
        "eval", out, "--data", tiny.tiny_cache().corpus, "--no-rouge", "--card"
    ).err  # fmt: skip


def test_a_users_text_leaves_neither_its_block_nor_the_hubs_yaml() -> None:
    ready = set_up(tiny.tiny_cache().run(loss="ce"), "")
    run = RunConfig.load(cache=NASTY, student={"model": f"{NASTY}/x"}, train={"out": NASTY})

    text = card_text(run, ready.cache, {"student": NASTY, "losses": {NASTY: NASTY}}, {})

    ends = ("# A student", "It was", "settings and", "## ", "<!--", "Not measured", "    ")
    _, _, body = text.split("---\n", 2)
    assert all(line.startswith(ends) for line in body.splitlines() if line)
    assert ModelCard(text).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert ModelCard(
        card_text(RunConfig.load(student={"model": "org/some-1B"}), ready.cache, {}, {})
    ).data.base_model == ("org/some-1B")


def test_the_command_of_a_run_makes_the_same_run(flags: list[str]) -> None:
    run = tiny.tiny_cache().run(out="o", loss="sra", losses={"sra": {"cos": 0.5}}, shards=["a", "b=2"])
    command = command_of(run)

    assert "--shards a --shards 'b=2' " in command or "--shards a --shards b=2 " in command
    assert command.endswith("--set losses.sra.cos=0.5")


def test_a_student_answers_a_prompt_and_a_seed_draws_another_answer(out: Path) -> None:
    asked = ("generate", out, "--prompt", "Who lit the lamp?", "--prompt", "Is it late?", "--max-new-tokens", 12)
    likeliest, again = (json.loads(xkd_train(*asked, "--json").out) for _ in range(2))
    drawn, other = (json.loads(xkd_train(*asked, "--json", "--sample", seed).out) for seed in (1, 2))

    assert [answer["prompt"] for answer in likeliest] == ["Who lit the lamp?", "Is it late?"]
    assert likeliest == again
    assert likeliest != drawn != other
    assert xkd_train(*asked).out == "".join(f"{answer['response']}\n" for answer in likeliest)
    assert "is empty" in xkd_train("generate", out, "--prompt", " ").err


class Hub:
    """As much of the hub as an upload needs; its refusal says the token that it was given."""

    endpoint = "https://hub.invalid"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[Any] = []
        self.refuses = False

    def create_repo(self, name: str, **how: Any) -> None:
        self.created.append((name, how))
        if self.refuses:
            raise type("Refused", (Exception,), {"server_message": f"not with {TOKEN}"})

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **_: Any) -> None:
        self.files = {name: (folder_path / name).read_bytes() for name in allow_patterns}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(card, "HfApi", lambda: made)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


def test_a_finished_student_is_pushed_whole_and_private(flags: list[str], hub: Hub) -> None:
    folder = Path(flags[flags.index("--out") + 1])
    (folder / "note.txt").write_text("not of the student")
    ended = xkd_train(*flags, "--push", "ann/tiny")

    assert ended.code == 0, ended.err
    assert ended.out.endswith("/ann/tiny\n")
    assert hub.created == [("ann/tiny", {"private": True, "exist_ok": True})]
    names = json.loads((folder / "xkd.json").read_text())["files"].keys() | {"README.md", "xkd.json"}
    assert hub.files == {name: (folder / name).read_bytes() for name in names}
    assert "model.safetensors" in names
    assert TOKEN not in ended.out + ended.err


def test_a_push_that_fails_leaves_the_student_and_says_what_to_type(flags: list[str], hub: Hub) -> None:
    hub.refuses = True
    ended = xkd_train(*flags, "--push", "ann/tiny")

    assert ended.code == 66
    folder = flags[flags.index("--out") + 1]
    assert "ann/tiny was not pushed: " in ended.err
    assert f"Kept: the student in {folder}. Next: hf upload ann/tiny {folder} ." in ended.err
    assert TOKEN not in ended.out + ended.err
    assert xkd_train(*flags).code == 0
