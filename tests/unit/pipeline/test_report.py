"""The report page: what it counts, and that no text of a corpus can become anything but text in it."""

import json
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import small_cache
from damages import flip
from small_cache import made
from xkd_pipeline.reports import report as reports
from xkd_pipeline.reports.report import MAX_BINS, Histogram, gather, write_report
from xkd_pipeline.stages import documents_stage
from xkd_schemas.cache.manifest import Commit, Manifest
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import BadData, InputMissing

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>\x1b[2J\u202egnp.exe\u2066 {{7*7}} &lt;b&gt;"
ALLOWED = (
    "html head meta title style body main header h1 h2 h3 p nav a section div table thead tbody tr th td details "
    "summary small code bdi figure figcaption span svg g path line text rect defs clippath tspan"
)


class Page(HTMLParser):
    """What is in a page: tags, attributes and the text outside of the style sheet."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if tag == "section" and name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(cache: Path, tmp_path: Path) -> tuple[str, Page]:
    write_report(cache, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    return content, Page(content)


def assert_harmless(content: str, page: Page) -> None:
    assert set(page.tags) <= set(ALLOWED.split())
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in {"src", "srcset", "action", "formaction", "data", "style", "background"} or tag in {"rect"}
        if name in {"href", "xlink:href"}:
            assert value.startswith("#")
        if "url(" in value:
            assert value.startswith("url(#")
        if ":" in value and "//" in value:
            assert name.startswith("xmlns")
    assert not any(ord(char) < 32 and char != "\n" for char in content)
    assert not any(char in content for char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\x7f\x9b")
    assert "default-src 'none'" in content


def test_a_full_cache_has_every_section_and_all_documents_are_drawn(tmp_path: Path) -> None:
    report = gather(made() / "cache")
    content, page = written(made() / "cache", tmp_path)

    assert [manifest.table for manifest, _ in report["tables"]] == ["documents", "teachers/T", "students/S"]
    assert {name for name, _ in report["kept"][0].signals} >= {"tokens", "hidden_last", "span_geometry@2:word"}
    assert report["cuts"] == [
        ("teachers/T", "cut at the longest length", 0),
        ("students/S", "cut at the longest length", 0),
        ("students/S", "cut before the teacher's cut", 0),
    ]
    assert page.ids == ["inside", "provenance", "bytes", "sizes", "alignment", "rejects", "cuts", "codecs"]
    assert page.tags["svg"] == 1 + 7 + 1
    assert "bf16 rounding only" in page.text
    for row in Table(made() / "cache", "documents"):
        assert row["doc_id"] in page.text
    assert Table(made() / "cache", "teachers/T").manifest.root in page.text
    assert_harmless(content, page)


def test_shapes_and_worst_documents_are_those_of_a_plain_count() -> None:
    shapes: Counter[str] = Counter()
    shares = []
    for number, row in enumerate(Table(made() / "cache", "students/S")):
        exact = total = 0
        for (a, b), (c, d) in zip(row["student_spans"].tolist(), row["teacher_spans"].tolist(), strict=True):
            shapes[f"{'1' if b - a == 1 else 'n'}:{'1' if d - c == 1 else 'n' if b - a == 1 else 'm'}"] += 1
            exact += 2 * (b - a == d - c == 1)
            total += b - a + d - c
        shares.append((exact / total, number))

    (found,) = gather(made() / "cache")["alignments"]

    assert found.shapes == {"1:1": 0, "1:n": 0, "n:1": 0, "n:m": 0} | shapes
    assert [row for _, row in found.worst] == [row for _, row in sorted(shares)]
    assert [share for share, _ in found.worst] == pytest.approx([share for share, _ in sorted(shares)])


def test_only_the_worst_few_are_kept_and_a_sample_of_shards_is_said_to_be_one(tmp_path: Path, monkeypatch) -> None:
    everything = gather(made() / "cache")["alignments"][0].worst
    monkeypatch.setattr(reports, "WORST", 3)
    monkeypatch.setattr(reports, "SAMPLED_SHARDS", 2)

    found = gather(made() / "cache")

    assert found["alignments"][0].worst == everything[:3]
    assert "from 2 of 3 shards" in {h.remark for h in found["histograms"]}
    assert "estimated from 2 of 3 shards" in written(made() / "cache", tmp_path)[1].text


def test_bytes_by_signal_are_the_bytes_of_the_columns() -> None:
    (kept,) = gather(made() / "cache")["kept"]
    rows = list(Table(made() / "cache", "teachers/T"))
    states = sum(row["hidden_last"].nbytes for row in rows)

    assert states <= dict(kept.signals)["hidden_last"] <= states + 8 * (len(rows) + 3)
    assert kept.read == kept.shards == 3


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": HOSTILE, "response": f"The old lamp {HOSTILE} was lit."}, "{not json " + HOSTILE]
    corpus = small_cache.write_rows(tmp_path / "a<img src=x onerror=alert(3)>.jsonl", [*rows, *[rows[0]] * 3])
    small_cache.cache_of(tmp_path / "cache", corpus, documents={"max_reject": 0.9})

    content, page = written(tmp_path / "cache", tmp_path)

    assert_harmless(content, page)
    assert "<img src=x onerror=alert(1)>" in page.text, "it is shown, as text"
    assert r"\x1b[2J\u202egnp.exe" in page.text
    assert "{{7*7}}" in page.text
    assert "&lt;b&gt;" in page.text
    assert "a<img src=x onerror=alert(3)>.jsonl:1" in page.text
    assert "bad_json" in page.text


def test_a_cache_of_documents_alone_has_a_report(tmp_path: Path) -> None:
    corpus = small_cache.write_rows(tmp_path / "c.jsonl", small_cache.corpus_rows(3))
    run = small_cache.run_file(tmp_path / "cache", documents={"corpus": [str(corpus)]})
    documents_stage(run, small_cache.IN_PROCESS)
    (tmp_path / "cache" / "teachers" / "U").mkdir(parents=True)
    plan = json.loads((tmp_path / "cache" / "documents" / "plan.json").read_text())
    (tmp_path / "cache" / "teachers" / "U" / "plan.json").write_text(json.dumps(plan))
    _, page = written(tmp_path / "cache", tmp_path)

    assert page.ids == ["inside", "provenance", "sizes", "rejects", "cuts"]
    assert "teachers/U is not finished and is left out" in page.text


def test_codec_errors_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    manifest = Table(made() / "cache", "teachers/T").manifest
    coded = manifest.model_copy(update={"constants": {"codec_error": {"hidden_last": 0.0123}}})
    plain = manifest.model_copy(update={"constants": {}})

    assert list(reports._codec_errors(coded)) == [("teachers/T", "hidden_last", 0.0123)]
    assert {signal.partition("@")[0] for _, signal, _ in reports._codec_errors(manifest)} == {"span_geometry"}
    assert list(reports._codec_errors(plain)) == []


def test_no_cache_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="is not a folder"):
        write_report(tmp_path / "none", tmp_path / "r.html")
    cache = small_cache.copied(tmp_path)
    shard = next((cache / "students" / "S").glob("*.arrow"))
    flip(shard)
    with pytest.raises(BadData, match="corrupt"):
        write_report(cache, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_histogram_holds_every_size_once_in_few_bars() -> None:
    sizes = Histogram("x")
    for seed in range(3):
        sizes.add(np.random.default_rng(seed).integers(5, 5000, 400))
    bars = sizes.bars

    assert sum(count for _, _, count in bars) == 1200
    assert len(bars) <= MAX_BINS
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bars))
    assert Histogram("x").bars == []


def test_two_students_of_one_teacher_are_both_drawn(tmp_path: Path) -> None:
    cache = small_cache.copied(tmp_path)
    student = {"name": "S2", "tokenizer": str(made() / "teacher"), "template": "chat"}
    run = small_cache.whole_run(cache, student=student)
    small_cache.align_stage(run, small_cache.IN_PROCESS)
    _, page = written(cache, tmp_path)

    assert page.text.count("The worst 12 documents") == 2
    assert "S2 beside T" in page.text
    assert {a.student: a.worst[0][0] for a in gather(cache)["alignments"]}["S2"] == 1.0, "the same tokenizer"


def test_what_was_cut_lost_or_extended_in_a_table_is_listed_and_what_is_well_is_not() -> None:
    counts = ({"status:ok": 5, "status:too_long": 1, "cut": 2, "extended": 4}, {"status:too_long": 2, "tokens": 9})
    commits = tuple(Commit.model_construct(counts=found) for found in counts)
    manifest = Manifest.model_construct(table="teachers/t", commits=commits)

    assert list(reports._count_cuts(manifest)) == [
        ("teachers/t", "cut at the longest length", 2),
        ("teachers/t", "tokens with extended intervals", 4),
        ("teachers/t", "without tokens: too_long", 3),
    ]
