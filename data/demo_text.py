"""The demo's text: question and answer pairs and passages of a novel, read out of two PyPI archives.

Nothing is fetched here and nothing is written. Whatever is dropped is counted.
"""

import hashlib
import itertools
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import yaml

from xkd_schemas.errors import BadData

MANY_ANSWERS: Final = ("computers.yml", "emotion.yml")
"""In these files the items after the first are other answers to it; in all others each item answers the one before."""
CONTINUE: Final = "Continue the story.\n\n"
PASSAGE_WORDS: Final = 40
"""A prompt or response of prose ends at the first end of a sentence at or after this many words."""

Row = tuple[str, str]
"""Prompt and response."""
Counts = dict[str, float]
"""What is to be told about something that was made, by name."""


def chat_rows(wheel: Path) -> tuple[list[Row], Counts]:
    """Question and answer pairs from the English files of chatterbot-corpus, in file order, and what was dropped."""
    rows: list[Row] = []
    counts: Counts = {"chat: items that are no conversation, dropped": 0}
    with zipfile.ZipFile(wheel) as files:
        for name in sorted(n for n in files.namelist() if "/data/english/" in n and n.endswith(".yml")):
            for items in yaml.safe_load(files.read(name))["conversations"]:
                if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
                    counts["chat: items that are no conversation, dropped"] += 1
                elif name.endswith(MANY_ANSWERS):
                    rows += [(items[0].strip(), answer.strip()) for answer in items[1:]]
                else:
                    rows += [(a.strip(), b.strip()) for a, b in itertools.pairwise(items)]
    unique = list(dict.fromkeys(rows))
    return unique, {**counts, "chat: pairs": len(rows), "chat: pairs seen before, dropped": len(rows) - len(unique)}


def prose_rows(sdist: Path) -> tuple[list[Row], Counts]:
    """Passages of the novel "Botchan", each answered by the passage that follows it, and what was left out.

    No two rows overlap, and none crosses the border of a chapter.
    """
    with tarfile.open(sdist) as files:
        member = files.extractfile("sentencepiece-0.2.3/test/botchan.txt")
        if member is None:
            raise BadData(f"{sdist}: test/botchan.txt is not a file", fix=f"rm {sdist}, run again")
        text = member.read().decode("utf-8-sig")
    novel = text.split("\nCHAPTER I\r\n", 1)[1].split("\nEnd of Project Gutenberg's", 1)[0]
    rows: list[Row] = []
    words = 0
    for chapter in re.split(r"\nCHAPTER [IVX]+\.?\r\n", novel):
        words += len(chapter.split())
        parts = passages(" ".join(chapter.split()))
        rows += [(CONTINUE + prompt, response) for prompt, response in zip(parts[::2], parts[1::2], strict=False)]
    used = sum(len(prompt.removeprefix(CONTINUE).split()) + len(response.split()) for prompt, response in rows)
    return rows, {"prose: words left over at the ends of chapters": words - used}


def passages(text: str) -> list[str]:
    """Cut prose into runs of whole sentences of at least PASSAGE_WORDS words; a shorter rest is left out.

    >>> [len(p.split()) for p in passages("One two three. " * 30)]
    [42, 42]
    """
    found: list[str] = []
    run: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+", text):
        run += sentence.split()
        if len(run) >= PASSAGE_WORDS:
            found.append(" ".join(run))
            run = []
    return found


def prompt_key(prompt: str) -> str:
    """sha256 of the prompt's words; spelling variants in case, blanks and punctuation share it.

    >>> prompt_key("Are you  sapient?") == prompt_key("are you sapient")
    True
    """
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    words = re.findall(r"\w+", folded) or folded.split()
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row], Counts]:
    """(training rows, held-out rows, counts): a tenth of the prompts is held out, by `prompt_key`.

    Both lists are in the order of that key, which mixes the sources: the first N rows are a fair sample. A held-out
    row whose response also stands in the training rows is dropped, since it would measure memory.
    """
    ordered = sorted(rows, key=lambda row: (prompt_key(row[0]), row))
    usable = [row for row in ordered if all(row)]
    train = [row for row in usable if int(prompt_key(row[0])[:8], 16) % 10]
    learnt = {response for _, response in train}
    apart = [row for row in usable if int(prompt_key(row[0])[:8], 16) % 10 == 0]
    held = [row for row in apart if row[1] not in learnt]
    dropped: Counts = {
        "rows with an empty side, dropped": len(ordered) - len(usable),
        "held-out rows whose response is in training, dropped": len(apart) - len(held),
    }
    return train, held, dropped
