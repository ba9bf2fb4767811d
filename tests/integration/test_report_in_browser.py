"""The report in a real browser: every section is drawn, no script runs, nothing is fetched.

The control is a page of the same cache with its policy taken out and a script and an image put in: the same browser
must run the one and fetch the other, or the test would prove nothing.
"""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import small_cache
from seen_runs import seen_run
from xkd_pipeline.reports.report import write_report
from xkd_trainer.reports import write_report as write_training_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

SECTIONS = ("inside", "provenance", "bytes", "sizes", "alignment", "rejects", "cuts", "codecs")


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """(address, paths that were asked for) of a server on this machine."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def browsed(tmp_path: Path, page: Path, *flags: str) -> str:
    """The page's elements after it was loaded and drawn; every name but this machine's resolves to nothing."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def hostile_report(tmp_path: Path, address: str) -> Path:
    """A report whose corpus asks for `address` and for a changed title in many ways."""
    attacks = (
        f"</script><script>document.title='RAN'</script><img src='{address}/img' onerror=\"document.title='RAN'\">",
        f"</style><style>@import '{address}/css'; body{{background:url({address}/bg)}}</style>",
        f"</bdi></div></main><iframe src='{address}/frame'></iframe><link rel=stylesheet href={address}/link>",
        f"<svg onload=\"document.title='RAN'\"><image href='{address}/svg'/></svg>",
        f"<meta http-equiv=refresh content='0;url={address}/meta'>",
    )
    rows = [{"prompt": f"Who said {attack}?", "response": f"The old keeper said {attack}."} for attack in attacks]
    corpus = small_cache.write_rows(tmp_path / "corpus.jsonl", [*rows, f"{{broken {attacks[0]}"])
    small_cache.cache_of(tmp_path / "cache", corpus, documents={"max_reject": 0.9})
    write_report(tmp_path / "cache", tmp_path / "report.html")
    return tmp_path / "report.html"


def test_every_section_is_drawn_no_script_runs_and_no_request_leaves(
    tmp_path: Path, listener: tuple[str, list[str]]
) -> None:
    address, asked = listener
    page = hostile_report(tmp_path, address)

    drawn = browsed(tmp_path, page, "--dump-dom")

    for section in SECTIONS:
        assert f'<section id="{section}">' in drawn
    assert drawn.count("<svg ") == 9
    assert "<title>cache: cache report</title>" in drawn
    assert "<iframe" not in drawn
    assert "&lt;iframe" in drawn, "it is shown, as text"
    assert asked == []


def test_the_page_of_training_runs_draws_every_curve_runs_no_script_and_fetches_nothing(
    tmp_path: Path, listener: tuple[str, list[str]]
) -> None:
    address, asked = listener
    attack = f"</title></svg><script>document.title='RAN'</script><img src='{address}/img' onerror='document.title=1'>"
    outs = [
        seen_run(tmp_path / str(number), term=term, settings={"loss": f"{term}{number}"})
        for number, term in enumerate(("sra.cos", attack))
    ]
    write_training_report(outs, tmp_path / "runs.html")

    drawn = browsed(tmp_path, tmp_path / "runs.html", "--dump-dom")

    assert drawn.count("<figure>") == 15
    assert drawn.count("<title>") - 1 == 26, "two curves in 11 drawings, one in those of the terms of one run"
    for section in ("runs", "differing", "group-1", "group-5", "settings"):
        assert f'<section id="{section}">' in drawn
    assert "<title>training report</title>" in drawn
    assert "&lt;script" in drawn
    assert asked == []


def test_the_policy_alone_stops_what_the_same_browser_runs_and_fetches_without_it(
    tmp_path: Path, listener: tuple[str, list[str]]
) -> None:
    address, asked = listener
    write_report(small_cache.made() / "cache", tmp_path / "report.html")
    leak = f"<script>document.title='RAN'</script><img src='{address}/img' onerror=\"document.title='RAN'\">"
    leaky = (tmp_path / "report.html").read_text().replace("</main>", f"{leak}</main>")
    open_to_all, policies = re.subn("<meta http-equiv=.Content-Security-Policy.[^>]*>", "", leaky)
    pages = tmp_path / "leaky.html", tmp_path / "open.html"
    for page, text in zip(pages, (leaky, open_to_all), strict=True):
        page.write_text(text)

    assert policies == 1
    assert "<title>RAN</title>" not in browsed(tmp_path, pages[0], "--dump-dom")
    assert asked == []
    assert "<title>RAN</title>" in browsed(tmp_path, pages[1], "--dump-dom")
    assert asked == ["/img"]


def test_the_page_is_not_blank(tmp_path: Path) -> None:
    write_report(small_cache.made() / "cache", tmp_path / "report.html")
    picture = tmp_path / "report.png"

    browsed(tmp_path, tmp_path / "report.html", f"--screenshot={picture}", "--window-size=1100,2400")

    assert picture.stat().st_size > 60_000  # a white one has 13,000 bytes
