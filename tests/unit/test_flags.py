"""A setting is declared once: a field of the run file is a flag with its docstring as help."""

from pathlib import Path

import click
import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from xkd_pipeline.cli.app import app as cache_app
from xkd_schemas import config, flags
from xkd_schemas.config import RunConfig
from xkd_schemas.flags import FlagsOf, with_flags
from xkd_trainer.cli import app as train_app

CACHE, TRAIN = typer.main.get_command(cache_app), typer.main.get_command(train_app)
COMMANDS = {**{f"xkd-cache {n}": c for n, c in CACHE.commands.items()}, "xkd-train": TRAIN}
COMMANDS |= {f"xkd-train {n}": c for n, c in TRAIN.commands.items()}


class TrainSection(config.TrainSection):
    half_life: float = Field(default=2.5, gt=0)
    """Epochs after which something is halved."""


class OneMore(RunConfig):
    train: TrainSection = TrainSection()


def test_a_field_added_to_a_section_is_a_flag_a_key_and_a_refusal(tmp_path: Path, monkeypatch) -> None:
    for module in (config, flags):
        monkeypatch.setattr(module, "RunConfig", OneMore)
    app, run = typer.Typer(rich_markup_mode=None), tmp_path / "run.toml"
    app.command()(with_flags(FlagsOf("train"), run_file="--run")(lambda run: typer.echo(run.train.half_life)))
    run.write_text("[train]\nhalf_life = 4.0\n")

    def said(*arguments: object) -> str:
        done = CliRunner().invoke(app, list(map(str, arguments)), standalone_mode=False)
        return " ".join(f"{done.output} {done.exception or ''}".split())

    assert "--half-life NUMBER Epochs after which something is halved. [default: 2.5]" in said("--help")
    assert said() == "2.5"
    assert said("--run", run) == "4.0"
    assert said("--run", run, "--set", "train.half_life=5") == "5.0"
    assert said("--run", run, "--set", "train.half_life=5", "--half-life", "6") == "6.0"
    wrong = "Input should be greater than 0, found"
    assert said("--half-life", -1) == f"--half-life: {wrong} '-1'. Next: change --half-life"
    assert said("--set", "train.half_life=-1") == f"--set: train.half_life: {wrong} -1. Next: change train.half_life"
    run.write_text("[train]\nhalf_life = -1\n")
    assert said("--run", run) == f"{run}: train.half_life: {wrong} -1. Next: change train.half_life"
    assert said("--run", run, "--half-life", "x").startswith("--half-life: Input should be a valid number")
    run.write_text("[train]\nhalf_live = 1\n")
    assert said("--run", run).endswith("is not a key. Next: did you mean 'half_life'?")


def test_a_flag_of_two_sections_sets_both() -> None:
    asked: list[RunConfig] = []
    app = typer.Typer()
    both = ("max_tokens", "enable_thinking")
    command = with_flags(FlagsOf("student", only=both), FlagsOf("teacher", only=both))
    app.command()(command(lambda run: asked.append(run)))

    app(["--max-tokens", "99", "--enable-thinking", "true"], standalone_mode=False)

    for section in (asked[0].student, asked[0].teacher):
        assert (section.max_tokens, section.enable_thinking) == (99, True)


def help_of(command: str) -> dict[str, str]:
    """What the help says of each flag that takes one value."""
    context = click.Context(COMMANDS[command])
    flags = [p for p in COMMANDS[command].params if p.param_type_name == "option" and "completion" not in p.name]
    return {p.opts[0]: p.get_help_record(context)[1] for p in flags if p.get_help_record(context)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_says_what_it_is(command: str) -> None:
    assert [flag for flag, said in help_of(command).items() if len(said.partition("[")[0]) < 8] == []


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        ("xkd-cache align", "--template", "[default: auto]"), ("xkd-cache pair", "--teacher-template", "auto]"),
        ("xkd-cache teacher", "--for", "[default: mta,sra,dwa]"), ("xkd-cache teacher", "--threads", "[default: 1]"),
        ("xkd-cache add", "--codec", "[default: the table's own]"), ("xkd-cache add", "--for", "[default: none]"),
        ("xkd-cache documents", "--drop-contained", "spacy does and benepar does not"),
        ("xkd-train", "--threads", "0 leaves torch's choice"), ("xkd-train", "--lr", "[default: 0.0005]"),
        ("xkd-train eval", "--template", "[default: as trained]"), ("xkd-train", "--out", "always needed"),
    ],
)  # fmt: skip
def test_the_default_that_help_says_is_the_one_that_holds(command: str, flag: str, said: str) -> None:
    assert said in help_of(command)[flag]
