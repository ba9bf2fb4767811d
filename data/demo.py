"""The demo behind `make demo`: one teacher pass, two students of equal size and steps, one table.

Run after data/demo_assets.py. Every step is a command that you could type; it is printed, timed, and skipped by the
command itself where its result is there already.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
RUN = Path("runs/demo.toml")


@dataclass(frozen=True)
class Step:
    """One finished command."""

    title: str
    seconds: float
    result: dict[str, Any]
    reused: bool


def main() -> None:
    """Run all steps, print the table, write demo/report.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.out
    steps = [
        _step("compare the tokenizers on 128 rows", _pair(out), lambda _: False, _goes_together),
        _step(
            "plan the cache from 128 rows", ["xkd-cache", "plan", "--run", str(RUN), *_FEW], lambda _: False, _needs
        ),
        _step("cache of the training rows", ["xkd-cache", "preprocess", str(RUN)], _made),
        _step("cache of the held-out rows", ["xkd-cache", "preprocess", str(RUN), *_held(out)], _made),
    ]
    students = {"without teacher": "ce", "with teacher": _distilled_loss()}
    rows: dict[str, dict[str, Any]] = {"teacher": _evaluate(out, "teacher", out / "teacher", steps)}
    for name, loss in students.items():
        folder = out / f"student-{name.replace(' ', '-')}-{arguments.seed}"
        command = ["xkd-train", "--run", str(RUN), "--loss", loss, "--out", str(folder), "--seed", str(arguments.seed)]
        steps.append(_step(f"train the student {name}", command, lambda r: not r["terms"]))
        rows[name] = _evaluate(out, f"student {name}", folder, steps)
    page = out / "report.html"
    draw = ["xkd-cache", "report", str(out / "cache"), "--out", str(page)]
    steps.append(_step("report of the cache", draw, lambda _: False))
    table = _table(rows)
    student = out / f"student-with-teacher-{arguments.seed}"
    (out / "report.md").write_text(_report(table, steps, student), encoding="utf-8")
    print(f"\n{table}\nstudent: {student}\nreport:  {out / 'report.md'}\ncache:   {page}")


def _distilled_loss() -> str:
    import tomllib

    return str(tomllib.loads(RUN.read_text())["train"]["loss"])


def _held(out: Path) -> list[str]:
    """The same run on the held-out rows, with nothing kept but what agreement needs."""
    sets = [f"cache={out}/held-cache", f'documents.corpus=["{out}/held.jsonl"]', "teacher.losses=[]"]
    sets += ["documents.rows_per_shard=40"]  # so that both workers have something to do
    return [part for setting in sets for part in ("--set", setting)]


_FEW = ["--sample", "128"]


def _pair(out: Path) -> list[str]:
    corpus = str(out / "train.jsonl")
    return ["xkd-cache", "pair", str(out / "teacher"), str(out / "tokenizer"), corpus, *_FEW, "--worst", "0"]


def _goes_together(result: dict[str, Any]) -> str:
    shared, tokens = result["vocabulary"], result["fertility"]
    return (
        f"{shared['shared']} of the student's {shared['student']} tokens are tokens of the teacher; "
        f"{tokens['teacher']['per_word']:.2f} and {tokens['student']['per_word']:.2f} tokens a word; "
        f"{100 * result['exact_share']:.1f} % of {result['spans']} aligned spans are one token to one"
    )


def _needs(result: dict[str, Any]) -> str:
    return (
        f"{result['tokens']} tokens, give or take {100 * result['give_or_take']:.0f} %: "
        f"{result['bytes'] / 1e6:.1f} MB with head and embeddings, "
        f"{result['bytes_per_token']:.0f} bytes a token: {result['naive']['share']:.3f} of states and full logits; "
        f"{result['shards']} shards, {result['memory_bytes'] / 1e9:.1f} GB of memory a worker"
    )


def _step(title: str, command: list[str], reused: Any, said: Any = None) -> Step:
    """Run one command with --json; its progress goes to the terminal, and then what `said` makes of its result."""
    print(f"\n== {title}\n   $ {' '.join(command)}", flush=True)
    start = time.monotonic()
    done = subprocess.run([BIN / command[0], *command[1:], "--json"], stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - start
    *lines, last = done.stdout.strip().splitlines() or [""]
    for line in lines:
        print(f"   {line}")
    if done.returncode:
        raise SystemExit(done.returncode)
    result = json.loads(last)
    step = Step(title, seconds, result, bool(reused(result)))
    if said:
        print(f"   {said(result)}")
    print(f"   {seconds:.0f} s{', reused what was there' if step.reused else ''}", flush=True)
    return step


def _made(result: dict[str, Any]) -> bool:
    return all(stage["made"] == 0 for stage in result["stages"])


def _evaluate(out: Path, name: str, folder: Path, steps: list[Step]) -> dict[str, Any]:
    """Evaluation of one model on the held-out rows; kept beside the model and reused while the model is the same."""
    command = ["xkd-train", "eval", str(folder), "--data", str(out / "held.jsonl"), "--template", "chat"]
    command += ["--no-rouge"] if name == "teacher" else ["--shards", str(out / "held-cache"), *_ROUGE]
    kept = out / f"eval-{folder.name}.json"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    if kept.exists() and (stored := json.loads(kept.read_text()))["stamp"] == stamp:
        steps.append(Step(f"evaluate the {name}", 0.0, stored["result"], True))
        print(f"\n== evaluate the {name}\n   {kept}: reused what was there")
        return dict(stored["result"])
    steps.append(_step(f"evaluate the {name}", command, lambda _: False))
    kept.write_text(json.dumps({"stamp": stamp, "result": steps[-1].result}))
    return steps[-1].result


_ROUGE = ["--seeds", "10", "--limit", "48", "--max-new-tokens", "48"]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    head = "| | bits per byte | agrees with the teacher | ROUGE-L |\n|---|---|---|---|\n"
    lines = []
    for name, row in rows.items():
        label = "teacher" if name == "teacher" else f"student {name}"
        agreement = f"{row['agreement']:.1f} %" if "agreement" in row else ""
        rouge = f"{row['rouge_l']:.1f}" if "rouge_l" in row else ""
        lines.append(f"| {label} | {row['bits_per_byte']:.3f} | {agreement} | {rouge} |\n")
    return head + "".join(lines)


def _report(table: str, steps: list[Step], student: Path) -> str:
    times = "".join(f"| {step.title} | {step.seconds:.0f} s{' (reused)' if step.reused else ''} |\n" for step in steps)
    return (
        f"# Demo\n\nHeld-out rows, settings of {RUN}.\n\n{table}\n| step | time |\n|---|---|\n{times}\n"
        f"The student with teacher is in `{student}`:\n"
        f"`AutoModelForCausalLM.from_pretrained({str(student)!r})`.\n"
    )


if __name__ == "__main__":
    main()
