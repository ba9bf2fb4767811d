"""How the commands speak: one line, the right exit code, and nothing that steers a terminal."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from xkd_schemas import console as terminal
from xkd_schemas.console import run, say, say_json, warn
from xkd_schemas.errors import BadData, Mismatch, UsageError, XkdError


def raising(error: BaseException):
    def app(**_: object) -> None:
        raise error

    return app


def left(capsys, app) -> tuple[object, str, str]:
    """(exit code, stdout, stderr) of an app that leaves."""
    with pytest.raises(SystemExit) as caught:
        run("xkd-cache", app)
    return (caught.value.code, *capsys.readouterr())


def app_of(work) -> typer.Typer:
    app = typer.Typer()
    app.command()(lambda: work())
    return app


def test_a_users_mistake_is_one_line_on_stderr_and_its_exit_code(capsys) -> None:
    code, out, err = left(capsys, raising(BadData("x.arrow\nis corrupt.", kept="the rest.", fix="run\r\n\tagain")))

    assert (code, out, err) == (65, "", "xkd-cache: x.arrow is corrupt. Kept: the rest. Next: run again\n")


def test_memory_and_ctrl_c_have_codes_of_their_own_and_say_what_was_kept(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["xkd-cache"])
    stopped = raising(KeyboardInterrupt())
    for app, expected in ((raising(MemoryError()), 71), (stopped, 130), (app_of(stopped), 130)):
        code, _, err = left(capsys, app)

        assert code == expected
        assert err.count("\n") == 1
        assert "Kept: everything that was committed or saved so far. Next: " in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_a_cluster_sends_cleans_up_says_what_was_kept_and_leaves_with_143(capsys, number: int) -> None:
    cleaned = []

    def work(**_options: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(signal.getsignal(number))

    before = signal.getsignal(number)
    code, _, err = left(capsys, work)

    assert (code, err.count("\n"), err.startswith("xkd-cache: terminated. Kept: ")) == (143, 1, True)
    assert cleaned == [signal.SIG_DFL], "a second one would end it at once"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("swallowed", [True, False])
def test_a_signal_that_a_library_swallows_comes_again_and_disturbs_no_clean_up(monkeypatch, capsys, swallowed) -> None:
    monkeypatch.setattr(terminal, "AGAIN", 0.05)
    cleaned = []

    def app(standalone_mode: bool) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            if not swallowed:
                time.sleep(0.3)
                cleaned.append(True)
                raise
        time.sleep(5)
        return 0

    begun = time.monotonic()
    with pytest.raises(SystemExit) as left:
        run("xkd-test", app)

    assert (left.value.code, cleaned) == (130, [] if swallowed else [True])
    assert time.monotonic() - begun < 4
    assert capsys.readouterr().err.startswith("xkd-test: interrupted. ")


def test_what_typer_refuses_is_one_line_too_and_json_where_asked(capsys, monkeypatch) -> None:
    app = typer.Typer()

    @app.command()
    def work(count: int, deep: bool = False) -> None:
        raise AssertionError

    invalid, missing, unknown = "Invalid value for 'count'", "Missing argument 'count'", "No such option: --depp"
    for words, said in ((["x"], invalid), ([], missing), (["1", "--depp"], unknown)):
        monkeypatch.setattr(sys, "argv", ["xkd-cache", *words])
        code, out, err = left(capsys, app)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
        assert "Next: " in err
        assert "--help" in err
    monkeypatch.setattr(sys, "argv", ["xkd-cache", "--json"])
    code, out, _ = left(capsys, app)
    assert (code, json.loads(out)["error"]["code"]) == (2, 2)


def test_other_exit_codes_and_our_own_bugs_pass_through(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["xkd-cache"])
    assert left(capsys, app_of(raising(typer.Exit(7)))) == (7, "", "")
    assert left(capsys, raising(SystemExit(2))) == (2, "", "")
    assert left(capsys, lambda **_: None) == (0, "", "")
    with pytest.raises(ZeroDivisionError):
        run("xkd-cache", raising(ZeroDivisionError()))


def test_with_json_the_error_is_an_object_too(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["xkd-cache", "align", "--json"])
    code, out, err = left(capsys, raising(Mismatch("a\nb", fix="c")))

    assert json.loads(out) == {"error": {"code": 78, "kind": "Mismatch", "what": "a\nb", "kept": "", "next": "c"}}
    assert (code, err) == (78, "xkd-cache: a b. Next: c\n")


def test_of_several_processes_the_first_says_what_is_the_same_and_each_its_own(capsys, monkeypatch) -> None:
    own, same = BadData("x"), BadData("x")
    same.shared = True
    errors = (same, UsageError("x"), KeyboardInterrupt(), own)

    said = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        said.append([left(capsys, raising(error))[2].count("\n") for error in errors])
        say("line")
        say_json({})
        warn("line")
        out, err = capsys.readouterr()
        said[-1] += [out.count("\n"), err.count("\n")]
    assert said == [[1, 1, 1, 1, 2, 1], [0, 0, 0, 1, 0, 0]]


def test_the_traceback_is_there_for_who_asks(capsys, monkeypatch) -> None:
    monkeypatch.setenv("XKD_DEBUG", "1")
    _, _, err = left(capsys, raising(BadData("x")))

    assert "Traceback" in err
    assert err.endswith("xkd-cache: x.\n")


def test_nothing_printed_can_steer_a_terminal(capsys) -> None:
    nasty = "a\x1b[31m\r\n\x07\x80\x9b\x9f\u202a\u202e\u2066\u2069b[bold]\x7f\x00"
    say(nasty)
    warn(nasty)
    say_json({"x": nasty})
    out, err = capsys.readouterr()
    line, as_json = out.splitlines()

    assert line == "a[31mb[bold]"
    assert err == "warning: a[31mb[bold]\n"
    assert as_json.isascii()
    assert json.loads(as_json) == {"x": nasty}
    assert left(capsys, raising(BadData(nasty)))[2] == "xkd-cache: a[31m b[bold].\n"


CODES = {
    "UsageError": 2, "BadData": 65, "InputMissing": 66, "WorkersGone": 69, "OutOfMemory": 71, "DiskFailed": 74,
    "Busy": 75, "NonFinite": 76, "Refused": 77, "Mismatch": 78, "Interrupted": 130, "Terminated": 143,
}  # fmt: skip
KINDS = XkdError.__subclasses__()


def test_every_error_has_the_exit_code_that_is_documented() -> None:
    assert {kind.__name__: kind.exit_code for kind in KINDS} == CODES
    for page in ("README.md", "docs/reliability.md"):
        text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
        assert all(re.search(rf"[ |]{code}\b", text) for code in CODES.values()), page


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_back_from_a_worker(kind: type[XkdError]) -> None:
    error = pickle.loads(pickle.dumps(kind("x is broken", kept="y", fix="z")))

    assert type(error) is kind
    said = (error.what, error.kept, error.fix, str(error))
    assert said == ("x is broken", "y", "z", "x is broken. Kept: y. Next: z")


PROGRAM = "import sys; sys.path.insert(0, {folder!r}); from xkd_schemas import entry; entry.train()"
SIGNALLED = "import os, signal\nos.kill(os.getpid(), signal.{name})\n"
WITH_ITS_OWN_ERROR = SIGNALLED + "raise ImportError('of the C code')\n"


@pytest.mark.parametrize(
    ("module", "content", "name", "code"),
    [
        ("typer", SIGNALLED, "SIGTERM", 143), ("torch", SIGNALLED, "SIGUSR1", 143),
        ("torch", WITH_ITS_OWN_ERROR, "SIGINT", 130),
    ],
)  # fmt: skip
def test_a_signal_while_modules_are_imported_ends_in_one_line(
    tmp_path: Path, module: str, content: str, name: str, code: int
) -> None:
    (tmp_path / f"{module}.py").write_text(content.format(name=name))
    argv = ["--shards", "x", "--student", "y", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(tmp_path)), *argv],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith(f"xkd-train: {'terminated' if code == 143 else 'interrupted'}. Kept: everything")
