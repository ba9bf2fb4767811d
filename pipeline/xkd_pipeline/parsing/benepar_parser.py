"""Every noun and verb phrase of a constituency parse by benepar 0.2.0.

spaCy cuts the text into sentences and tokens; benepar sees the tokens that are more than blanks, and
its leaves are mapped back to characters here. Its own spaCy component is not used: it fails on a
sentence that ends in a blank token or has none but blank ones, takes blank tokens for words, and
overwrites tags. A sentence it cannot take (too long, or nothing its tokenizer reads) keeps its words,
has no phrases, and is counted in `notes`.
The sentences of one document make a batch, so that the rounding of a padded batch, and with it a close
decision, never depends on the documents that happen to stand beside it.
"""

import contextlib
import itertools
import json
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from xkd_pipeline.parsing.spacy_parser import UNUSED, Phrase, PipelineParser, folder_digest, joined_spans, words_of
from xkd_pipeline.workers.contract import first_line
from xkd_schemas.config import DocumentsSection
from xkd_schemas.documents import Document, Interval, Spans
from xkd_schemas.durable_files import sha256_of
from xkd_schemas.errors import BadData, InputMissing, Refused, UsageError
from xkd_schemas.progress import tick_each

MAX_SENTENCE_TOKENS: Final = 256
"""Tokens of the longest sentence that is parsed: memory grows with their square, to 0.9 GB at 300."""
SUBBATCH_TOKENS: Final = 500  # sub-words benepar takes at once, padding included
PLACEHOLDER: Final = "X"
"""Stands for a token that the model's tokenizer would drop, such as a lone zero-width character."""
SEGMENTERS: Final = ("parser", "senter", "sentencizer")  # spaCy components that cut sentences

TOO_LONG: Final = "sentence_too_long"
NOT_ENCODABLE: Final = "sentence_not_encodable"
LABELS: Final = ("NP", "VP")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One sentence as benepar's model takes it; leaf i stands for `words[i]`."""

    words: tuple[str, ...]  # [T] without blank ones
    space_after: tuple[bool, ...]  # [T]
    intervals: tuple[Interval, ...]  # [T] characters of the parsed text
    tree: None = None  # benepar asks whether there is a gold tree


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


class BeneparParser(PipelineParser):
    """Constituents NP and VP; see the module."""

    def __init__(self, settings: DocumentsSection) -> None:
        self.path = locate_model(settings.parser_model)
        super().__init__(
            settings, "benepar", drop_contained=bool(settings.drop_contained),
            exclude=(*UNUSED, "tagger", "attribute_ruler"),
        )  # fmt: skip
        if not set(SEGMENTERS) & set(self.nlp.pipe_names):
            raise UsageError(f"the spaCy pipeline '{settings.spacy_model}' cuts no sentences", fix="use blank:en")
        self.model = load_model(self.path)
        self.labels = phrase_labels(self.model.label_vocab)

    def parse(self, documents: Sequence[Document]) -> list[Spans]:
        """Spans of each document, in order; a segment parsed in pieces counts as "segment_cut"."""
        spans = []
        for document in tick_each(documents):
            pieces = self._pieces(document)
            with self.nlp.memory_zone():
                texts = [document.text[start:end] for start, end in pieces]
                docs = list(self.nlp.pipe(texts, batch_size=self.texts_at_once))
                sentences = [list(self._sentences(doc)) for doc in docs]
                phrases = self._phrases(list(itertools.chain(*sentences)))
                found = [list(itertools.chain(*itertools.islice(phrases, len(own)))) for own in sentences]
                words = [words_of(doc) for doc in docs]
            kept = map(self._select, found, words)
            spans.append(joined_spans(zip((start for start, _ in pieces), words, kept, strict=True)))
        return spans

    def _sentences(self, doc: Any) -> Iterator[Sentence]:
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

    def _phrases(self, sentences: Sequence[Sentence]) -> Iterator[list[Phrase]]:
        if not sentences:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TreeCRF.*arg_constraints")  # torch_struct, on every call
            parses = self.model.parse(sentences, return_compressed=True, subbatch_max_tokens=SUBBATCH_TOKENS)
        for sentence, parse in zip(sentences, parses, strict=True):
            at, found = sentence.intervals, (parse.starts.tolist(), parse.ends.tolist(), parse.labels.tolist())
            yield [
                (at[start][0], at[end - 1][1], self.labels[label])
                for start, end, label in zip(*found, strict=True)
                if label in self.labels
            ]

    def identity(self) -> dict[str, str]:
        """Everything the spans depend on, with a probe of what is found in fixed texts."""
        return super().identity() | {
            "benepar": version("benepar"),
            "benepar_sha256": folder_digest(self.path) if self.path.is_dir() else sha256_of(self.path),
            "max_sentence_tokens": str(MAX_SENTENCE_TOKENS),
        }


@contextlib.contextmanager
def answer_special_tokens() -> Iterator[None]:
    """Let benepar 0.2.0 load under transformers 5, which has lost `build_inputs_with_special_tokens`.

    benepar asks it once, while loading, which special tokens stand round one sentence.
    """
    from transformers import PreTrainedTokenizerBase

    def with_special_tokens(self: Any, token_ids: list[int]) -> list[int]:
        encoded = self("a", return_special_tokens_mask=True)
        ids, own = encoded["input_ids"], np.flatnonzero(np.logical_not(encoded["special_tokens_mask"]))
        return [*ids[: own[0]], *token_ids, *ids[own[-1] + 1 :]]

    if hasattr(PreTrainedTokenizerBase, "build_inputs_with_special_tokens"):
        yield
        return
    PreTrainedTokenizerBase.build_inputs_with_special_tokens = with_special_tokens
    try:
        yield
    finally:
        del PreTrainedTokenizerBase.build_inputs_with_special_tokens


def locate_model(name: str | None) -> Path:
    """Folder or file of a benepar model.

    Raises:
        InputMissing: none is named, or it is neither a path nor installed.
        Refused: its configuration names code to run.
        BadData: its configuration is not that of a benepar model.
    """
    advice = "--parser-model FOLDER, or benepar.download('benepar_en3') in Python and --parser-model benepar_en3"
    if name is None:
        raise InputMissing("the parser benepar needs a model", fix=advice)
    from benepar.integrations import downloader

    try:
        path = Path(downloader.locate_model(name))
    except LookupError:
        raise InputMissing(f"there is no benepar model '{name}' here", fix=advice) from None
    if not path.is_dir():
        return path
    place = path / "config.json"
    try:
        config = json.loads(place.read_bytes())
    except (OSError, ValueError) as error:
        raise BadData(f"{place} cannot be read: {error}", fix="name the folder of a benepar model") from error
    if "auto_map" in json.dumps(config):
        raise Refused(f"{place} names code of its own to run (auto_map)", fix="use a model without custom code")
    if not isinstance(config, dict) or "benepar" not in config:
        raise BadData(f"{place} has no entry 'benepar'", fix="name the folder of a benepar model")
    return path


def load_model(path: Path) -> Any:
    """benepar's ChartParser from `path`, on the CPU; BadData where the files do not make a model."""
    import torch
    from benepar.parse_chart import ChartParser

    # what torch raises for a file that is no list of tensors; the class lives in a module that nothing here imports
    not_tensors = (vars(torch.serialization)["pickle"].UnpicklingError, EOFError, struct.error)
    try:
        with answer_special_tokens():
            return ChartParser.from_trained(str(path)).eval()
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, *not_tensors) as error:
        said = first_line(error)
        raise BadData(f"{path} cannot be loaded as a benepar model: {said}", fix="copy it again") from error


def phrase_labels(label_vocab: dict[str, int]) -> dict[int, str]:
    """NP or VP by label index, for the labels that have it.

    benepar writes a chain of constituents over the same words as one label, S::VP; the outermost NP or VP counts.

    >>> phrase_labels({"": 0, "S::VP": 1, "NP": 2, "WHNP": 3})
    {1: 'VP', 2: 'NP'}
    """
    chains = {index: [part for part in label.split("::") if part in LABELS] for label, index in label_vocab.items()}
    return {index: chain[0] for index, chain in chains.items() if chain}
