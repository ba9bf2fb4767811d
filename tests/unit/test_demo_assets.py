"""What data/demo_assets.py makes, checked on small archives built here: no network, no model."""

import doctest
import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from data_scripts import DATA, load_script
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import InputMissing, Mismatch

PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)
text = load_script("demo_text")
assets = load_script("demo_assets")


def corpus(path: Path, **files: list[object]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, conversations in files.items():
            content = json.dumps({"categories": [name], "conversations": conversations})
            wheel.writestr(f"chatterbot_corpus/data/english/{name}.yml", content)
        wheel.writestr("chatterbot_corpus/data/french/food.yml", json.dumps({"conversations": [["oui", "non"]]}))
    return path


def novel(path: Path, *chapters: str) -> Path:
    body = "".join(f"\r\nCHAPTER {'IVX'[i]}\r\n{chapter}" for i, chapter in enumerate(chapters))
    content = f"\ufeffLegal head.\r\n{body}\r\nEnd of Project Gutenberg's Botchan\r\n{'Legal tail. ' * 50}".encode()
    with tarfile.open(path, "w:gz") as sdist:
        member = tarfile.TarInfo("sentencepiece-0.2.3/test/botchan.txt")
        member.size = len(content)
        sdist.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
    rows = [{"prompt": f"{a} and {b}?", "response": f"{b}{a}, not {a}\u2028{b}."} for a in words for b in words]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(train: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    assets.make_tokenizer(folder, train)
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def test_dialogues_pair_neighbours_and_answer_lists_pair_with_their_question(tmp_path: Path) -> None:
    wheel = corpus(
        tmp_path / "c.whl", emotion=[["sad?", "no", "yes"]], food=[["a", "b ", "c"], ["a", "b"], "accident"]
    )

    rows, counts = text.chat_rows(wheel)

    assert rows == [("sad?", "no"), ("sad?", "yes"), ("a", "b"), ("b", "c")]
    assert list(counts.values()) == [1, 5, 1]  # no conversation, pairs, seen before


def test_prose_rows_are_neighbouring_passages_of_one_chapter_without_legal_text(tmp_path: Path) -> None:
    chapters = [" ".join(f"{name}{i} " + "word " * 18 + "end." for i in range(9)) for name in ("x", "y")]

    rows, counts = text.prose_rows(novel(tmp_path / "s.tar.gz", *chapters))

    assert [p.removeprefix(text.CONTINUE).split()[0] for p, _ in rows] == ["x0", "x4", "y0", "y4"]
    assert [r.split()[0] for _, r in rows] == ["x2", "x6", "y2", "y6"]
    assert all(side.endswith("end.") and "Legal" not in side for row in rows for side in row)
    assert list(counts.values()) == [40]  # words of x8 and y8


@given(st.lists(st.tuples(st.text("aAb ?", max_size=4), st.text("xyz", max_size=3)), max_size=60), st.randoms())
@settings(max_examples=60, deadline=None)
def test_no_prompt_and_no_answer_is_on_both_sides_and_no_row_is_lost_uncounted(rows, random) -> None:
    train, held, dropped = text.split(rows)
    again = list(rows)
    random.shuffle(again)

    assert {text.prompt_key(p) for p, _ in train}.isdisjoint(text.prompt_key(p) for p, _ in held)
    assert {r for _, r in train}.isdisjoint(r for _, r in held)
    assert len(train) + len(held) + sum(dropped.values()) == len(rows)
    assert text.split(again) == (train, held, dropped)


@pytest.mark.parametrize(("script", "examples"), [("demo_text", 2), ("demo", 5)])
def test_the_examples_in_the_docstrings_hold(script: str, examples: int) -> None:
    found = doctest.testmod(load_script(script))
    assert (found.failed, found.attempted >= examples) == (0, True)


def test_the_tokenizer_is_the_same_in_another_process(
    tokenizer: PreTrainedTokenizerFast, train: Path, tmp_path: Path
) -> None:
    program = "import sys, pathlib, demo_assets as d; d.make_tokenizer(*map(pathlib.Path, sys.argv[1:]))"
    elsewhere = {**os.environ, "PYTHONPATH": str(DATA), "PYTHONHASHSEED": "7"}

    subprocess.run([sys.executable, "-c", program, tmp_path, train], env=elsewhere, check=True)

    here = Path(tokenizer.name_or_path) / "tokenizer.json"
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == here.read_bytes()


@given(PLAIN)
@settings(max_examples=150, deadline=None)
def test_any_text_decodes_back_to_its_nfkc_form_but_for_one_leading_blank(tokenizer, content: str) -> None:
    ids = tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert tokenizer.unk_token_id not in ids
    nfkc = unicodedata.normalize("NFKC", content).replace("▁", " ")  # Metaspace writes a blank as U+2581
    assert tokenizer.decode(ids) == nfkc.removeprefix(" ")  # and takes a leading one for its own


@given(PLAIN, PLAIN)
@settings(max_examples=80, deadline=None)
def test_a_chat_is_its_turns_encoded_alone_between_special_tokens(tokenizer, question: str, answer: str) -> None:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)

    first, second = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, answer))
    bos, eos, user, assistant = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    assert whole == [bos, user, *first, eos, assistant, *second, eos]


def test_a_part_is_reused_until_a_file_or_its_recipe_changes(tmp_path: Path) -> None:
    def make(folder: Path) -> dict[str, float]:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("content")
        return {"files": 1}

    def ensure(recipe: str) -> bool:
        return bool(assets.ensure(tmp_path, "p", outputs=("part",), recipe=recipe, make=make))

    assert [ensure("1"), ensure("1"), ensure("2"), ensure("2")] == [True, False, True, False]
    (tmp_path / "part" / "file").write_text("CONTENT")
    assert [ensure("2"), ensure("2")] == [True, False]
    (tmp_path / "part" / "file").unlink()
    assert [ensure("2"), ensure("2")] == [True, False]
    assert (tmp_path / "part" / "file").read_text() == "content"


def test_a_part_that_fails_half_way_leaves_no_marker_and_no_rest(tmp_path: Path) -> None:
    def make(folder: Path) -> dict[str, float]:
        (folder / "part").write_text("half")
        raise InputMissing("the network is gone")

    with pytest.raises(InputMissing):
        assets.ensure(tmp_path, "p", outputs=("part",), recipe="1", make=make)

    assert list(tmp_path.iterdir()) == []


def test_text_is_made_from_pinned_archives_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = corpus(tmp_path / assets.CHATTERBOT, food=[[f"question {i}", f"answer {i}"] for i in range(50)])
    prose = novel(tmp_path / assets.BOTCHAN, "One two three. " * 90)
    pins = {assets.CHATTERBOT: ("c==1", sha256_of(chat)), assets.BOTCHAN: ("s==1", sha256_of(prose))}
    monkeypatch.setattr(assets, "PINNED", pins)

    counts = assets.make_text(tmp_path, tmp_path)

    written = "".join((tmp_path / f"{name}.jsonl").read_text() for name in ("train", "held"))
    lines = [json.loads(line) for line in written.splitlines()]
    assert len(lines) == counts["train: rows"] + counts["held: rows"] == 50 + counts["prose: rows"]
    chat.write_bytes(b"another")
    with pytest.raises(Mismatch, match=r"chatterbot.* has sha256 .*Next: rm "):
        assets.make_text(tmp_path, tmp_path)


def test_the_program_says_in_one_line_what_pip_could_not_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    app = typer.Typer()
    app.command()(assets.main)

    done = CliRunner().invoke(app, ["--out", str(tmp_path / "demo")])

    assert done.exit_code == InputMissing.exit_code
    assert done.stderr.count("\n") == 1
    assert "could not download chatterbot-corpus==1.3.3" in done.stderr
    assert "--wheels FOLDER" in done.stderr
