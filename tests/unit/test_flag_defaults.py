import click
import pytest
from xkd_schemas.flag_defaults import with_defaults

from xkd_pipeline.cli.app import app as cache_app
from xkd_trainer.cli import app as train_app

CACHE, TRAIN = with_defaults(cache_app), with_defaults(train_app)
COMMANDS = {**{f"xkd-cache {n}": c for n, c in CACHE.commands.items()}, "xkd-train": TRAIN}
COMMANDS |= {f"xkd-train {n}": c for n, c in TRAIN.commands.items()}


def help_of(command: str) -> dict[str, str]:
    """What the help says of each flag that takes one value."""
    context = click.Context(COMMANDS[command])
    flags = [p for p in COMMANDS[command].params if p.param_type_name == "option" and not p.multiple]
    valued = [p for p in flags if not (p.is_flag and p.default is False) and "completion" not in p.name]
    return {p.name: p.get_help_record(context)[1] for p in valued if p.name != "help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_the_default_of_every_flag(command: str) -> None:
    silent = [name for name, said in help_of(command).items() if "[default: " not in said and "required]" not in said]

    assert silent == []


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("xkd-cache align", "template", "auto"), ("xkd-cache pair", "teacher_template", "auto"),
        ("xkd-cache teacher", "losses", "mta,sra,dwa"), ("xkd-cache teacher", "threads", "1"),
        ("xkd-train", "threads", "torch's own"), ("xkd-train", "lr", "0.0005"), ("xkd-train", "out", "none"),
        ("xkd-train eval", "template", "as trained"),
    ],
)  # fmt: skip
def test_the_default_that_help_says_is_the_one_that_holds(command: str, flag: str, default: str) -> None:
    assert default in help_of(command)[flag].partition("[default: ")[2]
