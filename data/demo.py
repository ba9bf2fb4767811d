"""The demo behind `make demo`: one teacher pass, students with and without it, two seeds of each, one table.

It says how long it will take, makes the teacher and the text (data/demo_assets.py), and then runs commands that you
could type: each is printed, timed, and skips by itself what is there already.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

BIN: Final = Path(sys.executable).parent
RUN: Final = Path("runs/demo.toml")
FEW: Final = ["--sample", "128"]
STUDENTS: Final = ("without teacher", "with teacher")
PROBE: Final = (0.088, 0.1)
"""Seconds of `probe` on two cores of an AMD EPYC with AVX2 and a busy host, where EXPECTED was measured."""
EXPECTED: Final[Mapping[str, tuple[float, float]]] = {
    "teacher, text and tokenizer": (45, 5),
    "tokenizers compared, cache planned": (17, 0),
    "cache of the training rows": (28, 46),
    "cache of the held-out rows, teacher evaluated": (22, 33),
    "students without teacher": (22, 27),
    "students with teacher": (21, 36),
    "students evaluated": (24, 7),
    "report of the cache": (2, 0),
}
"""Step -> seconds there that are Python's, and seconds that are matrix products."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command line; what its JSON result says, if anything; whether the result was there before."""

    words: Sequence[str]
    said: Callable[[Result], str] = lambda _: ""
    reused: Callable[[Result], bool] = lambda _: False


@dataclass(frozen=True)
class Step:
    """Commands that ran at the same time."""

    title: str
    seconds: float
    reused: bool


def main() -> None:
    """Say how long it takes, run all steps, print the table, write report.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one student of each kind for each seed")
    arguments = parser.parse_args()
    out: Path = arguments.out
    print(expected(*probe()), flush=True)
    demo = Demo(out)
    demo.assets()
    demo.run("tokenizers compared, cache planned", [_pair(out), _plan()])
    demo.run("cache of the training rows", [_preprocess()])
    title = "cache of the held-out rows, teacher evaluated"
    rows = {"teacher": demo.evaluated(title, [out / "teacher"], _preprocess(_held(out)))}
    stems = {name: f"student-{name.replace(' ', '-')}" for name in STUDENTS}
    folders = {name: [out / f"{stem}-{seed}" for seed in arguments.seeds] for name, stem in stems.items()}
    for name, loss in zip(STUDENTS, ("ce", _loss()), strict=True):
        commands = [_train(loss, seed, out_) for seed, out_ in zip(arguments.seeds, folders[name], strict=True)]
        demo.run(f"students {name}", commands)
    results = demo.evaluated("students evaluated", [folder for name in STUDENTS for folder in folders[name]])
    for number, name in enumerate(STUDENTS):
        rows[name] = results[number * len(arguments.seeds) :][: len(arguments.seeds)]
    page = out / "report.html"
    demo.run("report of the cache", [Command(["xkd-cache", "report", str(out / "cache"), "--out", str(page)])])
    text = f"{table(rows)}\n{verdict(rows)}\n"
    (out / "report.md").write_text(_report(text, demo.steps, folders["with teacher"][0]), encoding="utf-8")
    print(f"\n{text}\nreport:  {out / 'report.md'}\ncache:   {page}")
    print(f"took:    {sum(step.seconds for step in demo.steps) / 60:.1f} minutes")


def probe() -> tuple[float, float]:
    """Seconds of some Python and of some float32 products on one core, as this machine is busy now: medians."""
    import numpy as np

    square = np.ones((768, 768), np.float32)
    parts: tuple[Callable[[], Any], ...] = (
        lambda: sum(len(str(number)) for number in range(400_000)),
        lambda: [square @ square for _ in range(6)],
    )
    found = tuple(median(_seconds(part) for _ in range(9)) for part in parts)
    return found[0], found[1]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def expected(python: float, products: float) -> str:
    """What the steps will take on a machine whose probe took so many seconds.

    >>> print(expected(*PROBE).splitlines()[0])
    The demo takes about 5.6 minutes here once the packages are downloaded:
    >>> print(expected(2 * PROBE[0], 2 * PROBE[1]).splitlines()[0])
    The demo takes about 11.2 minutes here once the packages are downloaded:
    """
    scales = (python / PROBE[0], products / PROBE[1])
    seconds = {title: sum(s * e for s, e in zip(scales, parts, strict=True)) for title, parts in EXPECTED.items()}
    lines = [f"The demo takes about {sum(seconds.values()) / 60:.1f} minutes here once the packages are downloaded:"]
    return "\n".join([*lines, *(f"   {value:4.0f} s  {title}" for title, value in seconds.items())])


class Demo:
    """The steps so far."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: list[Step] = []

    def assets(self) -> None:
        """The teacher, the text and the student's tokenizer."""
        start = time.monotonic()
        _begin("teacher, text and tokenizer", command := ["python", "data/demo_assets.py", "--out", str(self.out)])
        code = subprocess.run([BIN / command[0], *command[1:]], check=False).returncode
        if code:
            raise SystemExit(code)
        self.steps.append(Step("teacher, text and tokenizer", time.monotonic() - start, reused=False))

    def run(self, title: str, commands: Sequence[Command]) -> list[Result]:
        """Run commands with --json at the same time, two at most; their results."""
        start = time.monotonic()
        _begin(title, *(command.words for command in commands))
        results = [result for two in range(0, len(commands), 2) for result in _together(commands[two : two + 2])]
        reused = bool(commands) and all(c.reused(result) for c, result in zip(commands, results, strict=True))
        self.steps.append(Step(title, time.monotonic() - start, reused))
        print(f"   {self.steps[-1].seconds:.0f} s{', reused what was there' if reused else ''}", flush=True)
        return results

    def evaluated(self, title: str, folders: Sequence[Path], *beside: Command) -> list[Result]:
        """Evaluations on the held-out rows, kept beside the models and reused while all is the same."""
        commands = {folder: _evaluate(self.out, folder) for folder in folders}
        stamps = {f: [(f / "model.safetensors").stat().st_mtime_ns, *commands[f].words] for f in folders}
        kept = {folder: self.out / f"eval-{folder.name}.json" for folder in folders}
        stored = {f: json.loads(kept[f].read_text()) if kept[f].exists() else {"stamp": []} for f in folders}
        missing = [folder for folder in folders if stored[folder]["stamp"] != stamps[folder]]
        results = self.run(title, [*beside, *(commands[folder] for folder in missing)])[len(beside) :]
        for folder, result in zip(missing, results, strict=True):
            stored[folder] = {"stamp": stamps[folder], "result": result}
            kept[folder].write_text(json.dumps(stored[folder]))
        return [stored[folder]["result"] for folder in folders]


def _begin(title: str, *commands: Sequence[str]) -> None:
    print("\n".join([f"\n== {title}", *(f"   $ {' '.join(words)}" for words in commands)]), flush=True)


def _together(commands: Sequence[Command]) -> list[Result]:
    """Results of commands that run at the same time; progress goes to the terminal; the first failure ends all."""
    words = [[str(BIN / command.words[0]), *command.words[1:], "--json"] for command in commands]
    threads = str(max(1, (os.cpu_count() or 1) // len(words)))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    running = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True, env=environment) for one in words]
    written = [process.communicate()[0] for process in running]
    if code := next((process.returncode for process in running if process.returncode), 0):
        raise SystemExit(code)
    results = []
    for command, text in zip(commands, written, strict=True):
        *lines, last = text.strip().splitlines()
        results.append(json.loads(last))
        for line in filter(None, [*lines, command.said(results[-1])]):
            print(f"   {line}")
    return results


def _pair(out: Path) -> Command:
    words = ["xkd-cache", "pair", str(out / "teacher"), str(out / "tokenizer"), str(out / "train-small.jsonl")]
    return Command([*words, *FEW, "--worst", "0"], _goes_together)


def _plan() -> Command:
    return Command(["xkd-cache", "plan", "--run", str(RUN), *FEW], _needs)


def _preprocess(words: Sequence[str] = ()) -> Command:
    made = ["xkd-cache", "preprocess", str(RUN), *words]
    return Command(made, reused=lambda result: all(stage["made"] == 0 for stage in result["stages"]))


def _held(out: Path) -> list[str]:
    """The same run on the held-out rows, with nothing kept but what agreement needs."""
    sets = [f"cache={out}/held-cache", f'documents.corpus=["{out}/held-small.jsonl"]', "teacher.losses=[]"]
    sets += ["teacher.threads=1"]  # the other core evaluates the teacher
    return [part for setting in sets for part in ("--set", setting)]


def _train(loss: str, seed: int, out: Path) -> Command:
    words = ["xkd-train", "--run", str(RUN), "--loss", loss, "--out", str(out), "--seed", str(seed)]
    return Command(words, reused=lambda result: not result["terms"])


def _loss() -> str:
    return str(tomllib.loads(RUN.read_text(encoding="utf-8"))["train"]["loss"])


def _evaluate(out: Path, folder: Path) -> Command:
    words = ["xkd-train", "eval", str(folder), "--data", str(out / "held-small.jsonl"), "--template", "chat"]
    agreement = [] if folder.name == "teacher" else ["--shards", str(out / "held-cache")]
    return Command([*words, "--no-rouge", *agreement])


def _goes_together(result: Result) -> str:
    shared, tokens = result["vocabulary"], result["fertility"]
    return (
        f"{shared['shared']} of the student's {shared['student']} tokens are tokens of the teacher; "
        f"{tokens['teacher']['per_word']:.2f} and {tokens['student']['per_word']:.2f} tokens per word; "
        f"{100 * result['exact_share']:.1f} % of {result['spans']} aligned spans are one token to one"
    )


def _needs(result: Result) -> str:
    return (
        f"{result['tokens']} tokens, give or take {100 * result['give_or_take']:.0f} %: "
        f"{result['bytes'] / 1e6:.1f} MB with head and embeddings, "
        f"{result['bytes_per_token']:.0f} bytes per token; "
        f"{result['shards']} shards, {result['memory_bytes'] / 1e9:.1f} GB of memory per worker"
    )


def table(rows: Mapping[str, Sequence[Result]]) -> str:
    """Means over the seeds, each seed behind them.

    >>> print(table({"teacher": [{"bits_per_byte": 1.0}], "with teacher": [{"bits_per_byte": 2.5, "agreement": 9.0},
    ...     {"bits_per_byte": 2.7, "agreement": 10.0}]}).splitlines()[-1])
    | student with teacher | 2.600 (2.500, 2.700) | 9.5 % (9.0, 10.0) |
    """
    lines = ["| | bits per byte, mean (each seed) | agrees with the teacher |", "|---|---|---|"]
    for name, results in rows.items():
        bits = _spread([result["bits_per_byte"] for result in results], "{:.3f}", "")
        agreement = _spread([result["agreement"] for result in results if "agreement" in result], "{:.1f}", " %")
        lines.append(f"| {name if name == 'teacher' else f'student {name}'} | {bits} | {agreement} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], form: str, unit: str) -> str:
    if not values:
        return ""
    return form.format(mean(values)) + unit + (f" ({', '.join(map(form.format, values))})" if len(values) > 1 else "")


def verdict(rows: Mapping[str, Sequence[Result]]) -> str:
    """What the table shows; a difference is called one only where all seeds of one kind are on one side of the other.

    >>> verdict({"without teacher": [{"bits_per_byte": 2.7}, {"bits_per_byte": 2.6}],
    ...          "with teacher": [{"bits_per_byte": 2.4}, {"bits_per_byte": 2.5}]})
    'Every student with teacher needs fewer bits than every student without: 0.200 in the mean.'
    >>> verdict({"without teacher": [{"bits_per_byte": 2.7}, {"bits_per_byte": 2.4}], "with teacher": [
    ...     {"bits_per_byte": 2.5}, {"bits_per_byte": 2.3}]})
    'The seeds differ more than the two kinds of student: this run shows no difference.'
    >>> verdict({"without teacher": [{"bits_per_byte": 2.7}], "with teacher": [{"bits_per_byte": 2.9}]})
    'Every student with teacher needs more bits than every student without: 0.200 in the mean.'
    """
    without, taught = ([result["bits_per_byte"] for result in rows[name]] for name in STUDENTS)
    gain = mean(without) - mean(taught)
    if max(taught) < min(without) or min(taught) > max(without):
        which = "fewer" if gain > 0 else "more"
        return (
            f"Every student with teacher needs {which} bits than every student without: {abs(gain):.3f} in the mean."
        )
    return "The seeds differ more than the two kinds of student: this run shows no difference."


def _report(text: str, steps: Sequence[Step], student: Path) -> str:
    times = "".join(f"| {step.title} | {step.seconds:.0f} s{' (reused)' if step.reused else ''} |\n" for step in steps)
    return (
        f"# Demo\n\nHeld-out rows, settings of {RUN}.\n\n{text}\n| step | time |\n|---|---|\n{times}\n"
        f"A student with teacher is in `{student}`:\n"
        f"`AutoModelForCausalLM.from_pretrained({str(student)!r})`.\n"
    )


if __name__ == "__main__":
    main()
