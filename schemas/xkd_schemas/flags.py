"""Flags of a command, made from the fields of the run file.

A field's name is its key in the run file and its flag (`batch_size` is `--batch-size`), its docstring is the help
text, and its default is shown. Every flag takes text: config.py says what does not fit.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from xkd_schemas.config import COMMAS, RunConfig, Section, load_run
from xkd_schemas.errors import UsageError

Command = Callable[..., None]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, slots=True)
class FlagsOf:
    """The fields of one section of the run file that a command takes.

    Args:
        section: Its key in the run file, with a dot for one inside another; "" for the run file's own fields, which
            have to be named in `only`.
        only: Fields; empty for all.
        without: Fields that are no flags of this command.
        flags: Field to flag, where the command calls it otherwise. Without dashes it is an argument; `--a/--no-a`
            takes no value.
        default: What the help says of the default, where the command has its own.
    """

    section: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    default: str = ""

    def make_flags(self) -> Iterator["_Flag"]:
        """A flag of every field; of a section inside, `lora`, those of its fields, as `--lora-rank`."""
        model: Any = RunConfig
        for part in self.section.split(".") if self.section else ():
            model = model.model_fields[part].annotation
        for name in self.only or model.model_fields:
            if name in self.without:
                continue
            spelling = self.flags.get(name, f"--{name.replace('_', '-')}")
            key, info = f"{self.section}.{name}".lstrip("."), model.model_fields[name]
            if isinstance(info.default, Section):
                inner = {field: f"{spelling}-{field.replace('_', '-')}" for field in type(info.default).model_fields}
                yield from FlagsOf(key, flags=inner, default=self.default).make_flags()
            else:
                yield _Flag(spelling, (key,), info, self.default)


ANSWERS: Final = (
    FlagsOf("documents", only=("form", "columns"), flags={"columns": "--column"}),
    FlagsOf("teacher", only=("template", "enable_thinking", "max_tokens", "dtype")),
    FlagsOf("generation", flags={"keep_cut": "--keep-cut/--no-keep-cut"}),
)
"""What both commands take that let a model answer prompts."""


@dataclass(frozen=True, slots=True)
class _Flag:
    """One flag, and the keys of the run file that it sets."""

    spelling: str
    keys: tuple[str, ...]
    info: FieldInfo
    default: str

    @property
    def name(self) -> str:
        return self.keys[0].replace(".", "_")

    def read_value(self, value: Any) -> Iterator[tuple[str, str, Any]]:
        """What was typed, as `load_run` takes it."""
        pairs = {"": value} if _kind(self.info) is not dict else dict(self._pair(text) for text in value)
        yield from ((self.spelling, key + name, text) for name, text in pairs.items() for key in self.keys)

    def _pair(self, text: str) -> tuple[str, str]:
        name, _, value = text.partition("=")
        if not (name and value):
            raise UsageError(f"{self.spelling} {text}: expected KEY=VALUE", fix=f"e.g. {self.spelling} a=b")
        return f".{name}", value

    def parameter(self, *, needed: bool) -> inspect.Parameter:
        """As typer reads it."""
        kind, metavar = _kind(self.info), _metavar(self.info)
        said = " ".join((self.info.description or "").split())
        default = self.default or _text(self.info.default)
        typed: Any = list[str] if kind is dict or (kind is tuple and COMMAS not in self.info.metadata) else str
        if not self.spelling.startswith("-"):
            return _parameter(self.name, typed, self.spelling, needed, help=said, metavar=self.spelling.upper())
        if "/" in self.spelling:
            typed, metavar = bool, ""
        said += f" [default: {default}]" if default else ""
        return _parameter(self.name, typed, self.spelling, help=said, metavar=metavar or None)


def with_flags(*parts: FlagsOf, run_file: str = "") -> Callable[[Command], Command]:
    """Make a typer command of a function with a parameter `run: RunConfig`.

    In the place of `run` the command has the flags of `parts` and `--set`. Flags win over `--set`, and `--set` over
    the run file. Of flags that are spelled alike one sets all their keys.

    Args:
        parts: Fields of the run file.
        run_file: The flag, or argument, that names a run file; empty for a command that reads none.
    """
    flags: dict[str, _Flag] = {}
    for flag in (flag for part in parts for flag in part.make_flags()):
        same = flags.get(flag.spelling)
        flags[flag.spelling] = replace(same, keys=same.keys + flag.keys) if same else flag

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            path, sets = values.pop("run_file", None), values.pop("sets") or ()
            typed = [(flag, values.pop(flag.name)) for flag in flags.values()]
            given = (one for flag, value in typed if value is not None for one in flag.read_value(value))
            command(run=load_run(path, sets, given), **values)

        own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(command).parameters.values()]
        at = [parameter.name for parameter in own].index("run")
        made = [flag.parameter(needed=not run_file) for flag in flags.values()]
        if run_file:
            made.insert(0, _parameter("run_file", Path, run_file, help="Run file (TOML); flags override it."))
        signature = inspect.Signature([*own[:at], *made, _SET, *own[at + 1 :]])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _parameter(name: str, kind: Any, spelling: str, needed: bool = True, **said: Any) -> inspect.Parameter:
    if spelling.startswith("-"):
        needed, info = False, typer.Option(spelling, **said)
    else:
        info = typer.Argument(show_default=False, **said)
    default, kind = (inspect.Parameter.empty, kind) if needed else (None, kind | None)
    annotation: Any = Annotated[kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_SET: Final = _parameter("sets", list[str], "--set", help="KEY=VALUE of the run file; repeatable.")


def _kind(info: FieldInfo) -> Any:
    """Type of a field's values, without None; `tuple` or `dict` for those of several."""
    parts = get_args(info.annotation) if get_origin(info.annotation) in (Union, UnionType) else (info.annotation,)
    kind = next(part for part in parts if part is not NoneType)
    return get_origin(kind) if get_origin(kind) in (tuple, dict) else kind


def _metavar(info: FieldInfo) -> str:
    kind = _kind(info)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if COMMAS in info.metadata:
        return "A,B,..."
    return {bool: "true|false", int: "INTEGER", float: "NUMBER", dict: "KEY=VALUE"}.get(kind, "TEXT")


def _text(value: Any) -> str:
    """A default as it would be typed; "" for none.

    >>> _text(("mta", "sra")), _text(0.0005), _text(None)
    ('mta,sra', '0.0005', '')
    """
    return ",".join(map(str, value)) if isinstance(value, tuple) else "" if value in (None, {}) else str(value)
