"""What the pipeline asks of a parser, and the probe that tells two parsers apart."""

from collections import Counter
from collections.abc import Sequence
from typing import Final, Protocol

from xkd_schemas.documents import Document, Spans, document_of
from xkd_schemas.durable_files import digest

TEXTS_AT_ONCE: Final = 64  # texts handed to spaCy at once. Memory grows with it; spans do not depend on it


class Parser(Protocol):
    """Finds words and phrases. What it finds in a document depends on that document alone."""

    notes: Counter[str]  # what could not be parsed in full since the caller last cleared it, by reason

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        """Spans of each document, in order; none crosses a segment border."""

    def identity(self) -> dict[str, str]:
        """Everything the spans depend on: kind, versions, weights, settings, and the probe."""


def probe(parser: Parser) -> str:
    """sha256 over the spans of PROBE_TEXTS: changes with anything that changes what the parser finds."""
    notes = Counter(parser.notes)
    documents = [document_of([("text", text, True)], source="probe", line=1) for text in PROBE_TEXTS]
    spans = parser.parse(documents)
    parser.notes.clear()
    parser.notes.update(notes)
    return digest([[s.words, s.phrases, s.labels] for s in spans])


PROBE_TEXTS: Final = (
    "The old fisherman quietly repaired his torn net.",
    "She had never really understood why the bridge was built there.",
    "Can you list three reasons to visit Lisbon in spring?",
    "Rain.",
    "He doesn't want to go, and neither do I.",
    "Dr. Amara Okafor-Lind (b. 1961) won the prize twice; her sister, a cellist, didn't.",
    "Running quickly, the fox jumped over the very lazy dog and slept.",
    "It is raining, it has rained, it will have been raining.",
    "The price rose 3.5% to $1,204.75 on 12 May 2019.",
    "What the committee decided was immediately and widely criticised.",
    "1. Preheat the oven.\n2. Mix flour and sugar.\n3. Bake for 40 minutes.",
    "The lamp went out.\n\nShips passed in the dark.",
    "  Two blanks before,  two between, two after.  ",
    "\tTabs\tbetween\twords\tare\tblanks.",
    "First line\r\nsecond line\r\nthird line",
    "“Don’t touch that,” whispered the guide — too late.",
    "`x = [i ** 2 for i in range(10)]` builds a list.",
    "def add(a, b):\n    return a + b\n",
    '{"name": "Ada", "age": 36}',
    "See https://example.org/a?b=1#c or write to mail@example.org.",
    "ALL CAPITALS SHOUT AT THE READER",
    "no capitals no stops just words that go on",
    "Time flies like an arrow; fruit flies like a banana.",
    "The horse raced past the barn fell.",
    "Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo.",
    "To be or not to be: that is the question.",
    "Mary gave the boy with the red hat a very interesting book about whales.",
    "The man whom the woman you met yesterday married left.",
    "?!... --- ***",
    "",
    " ",
    "\n\n\n",
    "\u00a0\u2003\u3000",
    "Zero\u200bwidth and soft\u00adhyphen and \ufeffmark.",
    "naïve café, cafe\u0301, Ångström, ﬁne",
    "A family \U0001f468\u200d\U0001f469\u200d\U0001f467 waved \U0001f44b\U0001f3fd at us \U0001f1f5\U0001f1f9.",
    "東京は日本の首都です。人口は約1400万人です。",
    "שלום עולם, this is right to left.",
    "Привет, мир! Как дела?",
    "nul\x00inside and bell\x07 too",
    "supercalifragilisticexpialidocious" * 4,
    "e = mc², ∑ xᵢ ≤ ∞, α → β",
)
"""Fixed texts that tell two parsers apart. Never change one: every cache would look as if another parser made it."""
