"""What the help of a flag says of its default, where the flag's own is "not given": the run file's, or words."""

from typing import Any, Final

import typer
import typer.main

from xkd_schemas.config import default_of

_KEYS: Final = {
    "shards": "cache", "form": "documents.form", "parser": "documents.parser", "spacy_model": "documents.spacy_model",
    "max_words": "documents.max_words", "max_reject": "documents.max_reject", "workers": "workers",
    "losses": "teacher.losses", "template": "teacher.template", "teacher_template": "teacher.template",
    "max_tokens": "teacher.max_tokens", "dtype": "teacher.dtype", "codec": "teacher.codec", "topk": "teacher.topk",
    "samples": "teacher.samples", "batch_tokens": "teacher.batch_tokens", "teacher threads": "teacher.threads",
    "loss": "train.loss", "epochs": "train.epochs", "batch_size": "train.batch_size", "lr": "train.lr",
    "seed": "train.seed", "save_every": "train.save_every",
}  # fmt: skip
"""Parameter, or command and parameter, to the run file's key."""
_WORDS: Final = {
    "drop_contained": "the parser's own", "parser_model": "none", "ray_address": "none",
    "stall_timeout": "as said", "name": "the model's own", "word_layers": "half of the depth",
    "phrase_layers": "three quarters of the depth, and the last", "enable_thinking": "the template's own",
    "budget": "any size", "tokens_per_second": "not known", "run": "none", "run_file": "none", "out": "cache",
    "train out": "none, has to be said", "model": "none", "plan student": "not counted", "student": "none",
    "show student": "the first", "student_tokenizer": "the student's", "student_table": "the only one that fits",
    "steps": "what --epochs gives", "micro_batch_size": "the whole share of a step", "projector_lr": "its paper's",
    "threads": "torch's own", "teacher": "the only one", "to": "the only one", "signals": "none", "add losses": "none",
    "add codec": "the table's own", "eval template": "as trained, else auto", "eval enable_thinking": "as trained",
    "eval shards": "none", "add spacy_model": "the cache's own, else " + default_of("documents.spacy_model"),
    "repair spacy_model": "the cache's own",
}  # fmt: skip
"""The same to what is said."""


def with_defaults(app: typer.Typer) -> Any:
    """The command of a typer app, with a default in the help of every flag that takes one value."""
    root: Any = typer.main.get_command(app)
    for name, command in {"train": root, **root.commands}.items():
        for flag in command.params:
            said = _said(name, flag.name)
            if flag.param_type_name == "option" and flag.default in (None, "") and not flag.multiple and said:
                flag.show_default = said
    return root


def _said(command: str, flag: str) -> str:
    for name in (f"{command} {flag}", flag):
        if name in _WORDS:
            return _WORDS[name]
        if name in _KEYS:
            return default_of(_KEYS[name])
    return ""
