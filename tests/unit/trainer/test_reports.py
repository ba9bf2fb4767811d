"""What is shown of runs from their files: the page of curves, and the view in a terminal."""

import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from seen_runs import seen_run
from xkd_schemas.errors import InputMissing, UsageError
from xkd_train import xkd_train
from xkd_trainer import reports as watch
from xkd_trainer.reports import draw, draw_chart, status_of, write_report
from xkd_trainer.run_folder import read_run


def page_of(tmp_path: Path, *outs: Path) -> str:
    write_report(outs, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def texts(part: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", part).split())


def test_a_page_has_a_curve_of_each_run_for_each_term_and_only_the_settings_that_differ(tmp_path: Path) -> None:
    one = seen_run(tmp_path / "one", settings={"loss": "mta", "seed": 7})
    two = seen_run(tmp_path / "two", settings={"loss": "ce", "seed": 7}, term="dwa.kl", slope=2.0)

    page = page_of(tmp_path, one, two)

    drawings = re.findall(r'(<svg viewBox.*?"middle".*?>(.*?)</text>)', page, re.DOTALL)
    charts = {texts(title): text for text, title in drawings}
    assert {title: text.count("<polyline") for title, text in charts.items()} == {
        "loss": 2, "ce.ce": 2, "sra.cos": 1, "dwa.kl": 1, "bits per byte": 2, "agreement, %": 2, "gradient norm": 2,
        "learning rate": 2, "ce.ce, things per step": 2, "sra.cos, things per step": 1, "dwa.kl, things per step": 1,
        "tokens per second": 2, "seconds per step": 2, "waiting for data, % of a step": 2, "peak memory, GiB": 2,
    }  # fmt: skip
    differing = page.partition('<section id="differing">')[2].partition("</section>")[0]
    assert texts(differing) == "What differs setting one two train.loss mta ce"
    assert "lowest 1,000" not in charts["tokens per second"]
    assert "4,000" in charts["tokens per second"]
    assert "12" in texts(charts["sra.cos, things per step"]), "24 spans in two steps"
    assert "<script" not in page


def test_a_run_that_goes_on_is_shown_up_to_its_last_whole_line(tmp_path: Path) -> None:
    out = seen_run(tmp_path / "run", finished=False)
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 42, "loss": 1.')
    assert (read_run(out).state, read_run(out).step, read_run(out).settings) == ("stopped", 40, {})

    (out / "LOCK").write_text(f"pid {os.getpid()} on {os.uname().nodename}")
    state = out / "checkpoints" / "step-00000004" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"fingerprint": {"steps": 80, "train": {"loss": "mta"}}}))
    assert (read_run(out).state, read_run(out).settings["train.loss"]) == ("training", "mta")
    (out / "LOCK").write_text(f"pid 4194305 on {os.uname().nodename}")
    assert read_run(out).state == "stopped"
    assert "training report" in page_of(tmp_path, out)


def test_points_that_are_not_finite_are_left_out_and_many_are_averaged(tmp_path: Path) -> None:
    out = seen_run(tmp_path / "run")
    lines = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text('{"step": 1, "eval.bits_per_byte": NaN, "eval.agreement": 1.0}\n' + lines)
    assert "nan" not in page_of(tmp_path, out)
    assert read_run(out).best["step"] == 24

    chart = draw_chart("x", [[(step, 1.0 + step % 2) for step in range(3000)]], ["run"])

    assert (chart.low, chart.high, chart.last) == (1.0, 2.0, 2999)
    points = chart.curves[0].points.split()
    assert len(points) == 300
    assert {point.partition(",")[2] for point in points} == {"80.0"}


def test_the_seconds_of_a_step_are_the_median_of_all_stretches(tmp_path: Path) -> None:
    out = seen_run(tmp_path / "run")
    text = (out / "timing.jsonl").read_text()
    (out / "timing.jsonl").write_text(text.replace('"seconds_per_step": 0.5', '"seconds_per_step": 99.0', 1))

    assert read_run(out).seconds_per_step == 0.5


def test_hostile_names_and_settings_are_shown_as_text(tmp_path: Path) -> None:
    out = seen_run(tmp_path / "<b>\u202e", settings={"loss": "</table><img src=x>"}, term="<i>.\x07")

    page = page_of(tmp_path, out, seen_run(tmp_path / "plain"))

    for hostile in ("<b>", "<img", "<i>", "\u202e", "\x07"):
        assert hostile not in page
    for shown in (r"&lt;b&gt;\u202e", "&lt;img src=x&gt;", r"&lt;i&gt;.\x07"):
        assert shown in page


def test_report_and_watch_name_a_folder_without_a_run(tmp_path: Path) -> None:
    for command in ("report", "watch"):
        ended = xkd_train(command, tmp_path)
        assert ended.code == InputMissing.exit_code
        assert f"{tmp_path} holds no run" in ended.err
    with pytest.raises(UsageError, match="is a folder"):
        write_report([seen_run(tmp_path / "run")], tmp_path)


def test_the_view_has_step_loss_terms_speed_and_time_left(tmp_path: Path) -> None:
    out = seen_run(tmp_path / "run", steps=24, finished=False)
    for path, old, new in ((out / "timing.jsonl", '"total": 24', '"total": 324'),):
        path.write_text(path.read_text().replace(old, new))

    console = Console(width=100)
    with console.capture() as capture:
        console.print(draw(status_of(out)))

    said = " ".join(capture.get().split())
    values = ("tokens per second 2,000", "waiting for data 1.0 %", "peak memory 3.00 GiB")
    evaluated = "held-out bits per byte 2.0000 at step 24"
    for part in ("stopped step 24 of 324", "time left 2:30", "loss ", "sra.cos ", *values, evaluated):
        assert part in said


def test_watch_ends_when_the_run_does_and_json_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = seen_run(tmp_path / "run", finished=False)
    (out / "LOCK").write_text(f"pid {os.getpid()} on {os.uname().nodename}")
    pauses: list[float] = []

    def finish(seconds: float) -> None:
        pauses.append(seconds)
        (out / "xkd.json").write_text((seen_run(tmp_path / "other") / "xkd.json").read_text())

    monkeypatch.setattr(watch.time, "sleep", finish)
    ended = xkd_train("watch", out)

    assert (ended.code, len(pauses)) == (0, 1)
    assert "finished" in ended.out
    status = json.loads(xkd_train("watch", out, "--json").out)
    assert (status["state"], status["step"], status["seconds_left"]) == ("finished", 40, 0.0)
    assert status["best"]["step"] == 24
