"""Every noun and verb phrase of a constituency parse by benepar 0.2.0.

spaCy cuts the text into sentences and tokens; benepar sees the tokens that are more than blanks, and
its leaves are mapped back to characters here. Its own spaCy component is not used: it fails on a
sentence that ends in a blank token or has none but blank ones, takes blank tokens for words, and
overwrites tags. A sentence it cannot take (too long, or nothing its tokenizer reads) keeps its words,
has no phrases, and is counted in `notes`.
The sentences of one document make a batch, so that the rounding of a padded batch, and with it a close
decision, never depends on the documents that happen to stand beside it.
"""

import itertools
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final

from xkd_pipeline.parsing.benepar_model import load_model, locate_model, phrase_labels
from xkd_pipeline.parsing.parser import TEXTS_AT_ONCE, probe
from xkd_pipeline.parsing.phrases import Phrase, joined_spans, select_phrases
from xkd_pipeline.parsing.spacy_parser import (
    MAX_PIECE_CHARS,
    MAX_RUN_CHARS,
    UNUSED,
    document_pieces,
    folder_digest,
    load_pipeline,
    pipeline_identity,
    words_of,
)
from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Document, Interval, Spans
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import UsageError
from xkd_schemas.progress import ticked

MAX_SENTENCE_TOKENS: Final = 256
"""Tokens of the longest sentence that is parsed: memory grows with their square, to 0.9 GB at 300."""
SUBBATCH_TOKENS: Final = 500
"""Sub-words benepar takes at once, padding included."""
PLACEHOLDER: Final = "X"
"""Stands for a token that the model's tokenizer would drop, such as a lone zero-width character."""
SEGMENTERS: Final = ("parser", "senter", "sentencizer")
"""spaCy components that cut sentences."""

TOO_LONG: Final = "sentence_too_long"
NOT_ENCODABLE: Final = "sentence_not_encodable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One sentence as benepar's model takes it; leaf i stands for `words[i]`."""

    words: tuple[str, ...]
    """[T] without blank ones."""
    space_after: tuple[bool, ...]
    """[T]"""
    intervals: tuple[Interval, ...]
    """[T] characters of the parsed text."""
    tree: None = None
    """benepar asks whether there is a gold tree."""


def sentence_of(tokens: Sequence[Any], normalise: dict[str, str]) -> Sentence:
    """The spaCy tokens of one sentence without blank ones, in the spelling that benepar was trained on.

    Control, format and blank characters inside a token are not shown to the model.
    """
    words, space_after, intervals = [], [], []
    for token, following in itertools.zip_longest(tokens, tokens[1:]):
        if token.is_space:
            continue
        text = normalise.get(token.text, token.text)
        words.append("".join(c for c in text if unicodedata.category(c)[0] not in "CZ") or PLACEHOLDER)
        space_after.append(bool(token.whitespace_) or (following is not None and following.is_space))
        intervals.append((token.idx, token.idx + len(token)))
    return Sentence(words=tuple(words), space_after=tuple(space_after), intervals=tuple(intervals))


class BeneparParser:
    """Constituents NP and VP; see the module."""

    def __init__(self, settings: DocumentsSection) -> None:
        self.settings, self.texts_at_once = settings, TEXTS_AT_ONCE
        self._drop_contained = bool(settings.drop_contained)
        self.notes: Counter[str] = Counter()
        self.path = locate_model(settings.parser_model)
        self.nlp = load_pipeline(settings.spacy_model, exclude=(*UNUSED, "tagger", "attribute_ruler"))
        if not set(SEGMENTERS) & set(self.nlp.pipe_names):
            raise UsageError(f"the spaCy pipeline '{settings.spacy_model}' cuts no sentences", fix="use blank:en")
        self.model = load_model(self.path)
        self.labels = phrase_labels(self.model.label_vocab)
        self.max_piece_chars = min(MAX_PIECE_CHARS, int(self.nlp.max_length))

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        """Spans of each document, in order; a segment parsed in pieces counts as "segment_cut"."""
        spans = []
        for document in ticked(documents):
            pieces = list(document_pieces(document, self.max_piece_chars))
            if len(pieces) > len(document.segments):
                self.notes["segment_cut"] += len(pieces) - len(document.segments)
            with self.nlp.memory_zone():
                texts = [document.text[start:end] for start, end in pieces]
                docs = list(self.nlp.pipe(texts, batch_size=self.texts_at_once))
                spans.append(self._document(pieces, docs))
        return spans

    def _document(self, pieces: Sequence[Interval], docs: Sequence[Any]) -> Spans:
        """Parse the sentences of all pieces at once and put the phrases back into their pieces."""
        owners, sentences = [], []
        for number, doc in enumerate(docs):
            for sentence in self._sentences(doc):
                owners.append(number)
                sentences.append(sentence)
        found: list[list[Phrase]] = [[] for _ in docs]
        for owner, phrases in zip(owners, self._phrases(sentences), strict=True):
            found[owner] += phrases
        joined = []
        for (start, _), doc, phrases in zip(pieces, docs, found, strict=True):
            words = words_of(doc)
            kept = select_phrases(
                phrases, words, max_words=self.settings.max_words, drop_contained=self._drop_contained,
                notes=self.notes,
            )  # fmt: skip
            joined.append((start, words, kept))
        return joined_spans(joined)

    def _sentences(self, doc: Any) -> Iterator[Sentence]:
        """The sentences that can be parsed; each other one is counted."""
        from benepar.integrations.spacy_plugin import SentenceWrapper

        for span in doc.sents:
            sentence = sentence_of(list(span), SentenceWrapper.TEXT_NORMALIZATION_MAPPING)
            if not sentence.words:
                continue
            problem = self._problem(sentence)
            if problem == NOT_ENCODABLE:
                plain = tuple(w if w.isascii() else PLACEHOLDER for w in sentence.words)
                sentence = replace(sentence, words=plain)
                problem = self._problem(sentence)
            if problem:
                self.notes[problem] += 1
            else:
                yield sentence

    def _problem(self, sentence: Sentence) -> str:
        """Why the model cannot take a sentence, or "".

        benepar's encoder raises StopIteration or AssertionError where the tokenizer drops a token,
        ValueError where the sentence has too many sub-words.
        """
        if len(sentence.words) > MAX_SENTENCE_TOKENS:
            return TOO_LONG
        try:
            encoded = self.model.encode(sentence)
        except ValueError:
            return TOO_LONG
        except (StopIteration, AssertionError):
            return NOT_ENCODABLE
        if any(index < 0 for index in encoded.get("words_from_tokens", ())):
            return NOT_ENCODABLE
        return TOO_LONG if len(encoded.get("input_ids", ())) > self._max_subwords() else ""

    def _max_subwords(self) -> float:
        """Sub-words that the encoder has positions for; some encoders lose two of them."""
        encoder = self.model.pretrained_model
        positions = getattr(encoder.config, "max_position_embeddings", None) if encoder is not None else None
        if positions is None or self.model.retokenizer.tokenizer.model_max_length <= positions:
            return float("inf")
        return float(positions - 2)

    def _phrases(self, sentences: Sequence[Sentence]) -> Iterable[list[Phrase]]:
        """NP and VP of each sentence, in characters of its piece."""
        if not sentences:
            return []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TreeCRF.*arg_constraints")  # torch_struct, on every call
            parses = self.model.parse(sentences, return_compressed=True, subbatch_max_tokens=SUBBATCH_TOKENS)
        return [self._constituents(s, p) for s, p in zip(sentences, parses, strict=True)]

    def _constituents(self, sentence: Sentence, parse: Any) -> list[Phrase]:
        at = sentence.intervals
        return [
            (at[start][0], at[end - 1][1], self.labels[label])
            for start, end, label in zip(
                parse.starts.tolist(), parse.ends.tolist(), parse.labels.tolist(), strict=True
            )
            if label in self.labels
        ]

    def identity(self) -> dict[str, str]:
        """Everything the spans depend on, with a probe of what is found in fixed texts."""
        return {
            "kind": "benepar",
            **pipeline_identity(self.nlp),
            "benepar": version("benepar"),
            "benepar_sha256": folder_digest(self.path) if self.path.is_dir() else sha256_of(self.path),
            "max_words": str(self.settings.max_words),
            "drop_contained": str(self._drop_contained),
            "max_sentence_tokens": str(MAX_SENTENCE_TOKENS),
            "max_piece_chars": str(self.max_piece_chars),
            "max_run_chars": str(MAX_RUN_CHARS),
            "probe": probe(self),
        }
