"""Small tokenizers behind normalisers of every kind, and text that is in no normal form.

`normalising(kind)` is cached for the session; `NORMALISING` names the kinds. All but the WordPiece ones spell every
character, by bytes where they must, so that a test can read from the tokens what they stand for.
"""

import functools
import io
import json
from typing import Any

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import four_tokenizers
from hostile_text import CLUSTERS, MARKS, NASTY

MORE = (
    "tiếng Việt không có dấu và người",
    "한국어 각 값",
    "हिन्दी क़लम",
    "カタカナ ガギグゲゴ パピプペポ",
    "La fête a été très réussie",
)


def corpus() -> list[str]:
    return [*four_tokenizers.corpus(), *MORE * 4]


def _unigram(normaliser: Any) -> Tokenizer:
    """As T5's, but for characters it does not know it has bytes."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normaliser
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=four_tokenizers.SPECIALS, unk_token="<unk>", show_progress=False,
        max_piece_length=8,
    )  # fmt: skip
    trained.train_from_iterator(corpus(), trainer)
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    vocabulary += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram([(text, score) for text, score in vocabulary], 0, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normaliser, trained.pre_tokenizer
    tokenizer.add_special_tokens(four_tokenizers.SPECIALS)
    return tokenizer


def _changed(kind: str, normaliser: Any, *, pieces: bool = True) -> Tokenizer:
    """One of four_tokenizers with a normaliser; without `pieces` that one writes bytes, and nothing is cut."""
    tokenizer = four_tokenizers.fresh(kind).backend_tokenizer
    tokenizer.normalizer = normaliser
    if not pieces:
        tokenizer.pre_tokenizer = None
    return tokenizer


@functools.cache
def charsmap(rule: str) -> bytes:
    """The compiled characters map of a SentencePiece rule, as T5, ALBERT and XGLM ship it."""
    import sentencepiece
    from transformers.convert_slow_tokenizer import import_protobuf

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(four_tokenizers.corpus()), model_writer=out, vocab_size=300, hard_vocab_limit=False,
        normalization_rule_name=rule, minloglevel=2,
    )  # fmt: skip
    model = import_protobuf().ModelProto()
    model.ParseFromString(out.getvalue())
    return bytes(model.normalizer_spec.precompiled_charsmap)


def _albert() -> Any:
    return normalizers.Sequence(
        [
            normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(),
            normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Precompiled(charsmap("nmt_nfkc")),
        ]
    )  # fmt: skip


def _t5() -> Any:
    return normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap("nmt_nfkc")), normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )  # fmt: skip


MAKERS = {
    "qwen": lambda: _changed("byte_level", normalizers.NFC()),
    "nfd": lambda: _changed("byte_level", normalizers.NFD()),
    "bytes": lambda: _changed(
        "byte_level", normalizers.Sequence([normalizers.NFC(), normalizers.ByteLevel()]), pieces=False
    ),
    "nfkc": lambda: _unigram(normalizers.NFKC()),
    "folded": lambda: _unigram(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "t5": lambda: _unigram(_t5()),
    "albert": lambda: _unigram(_albert()),
    "prepended": lambda: _changed(
        "sentencepiece",
        normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "gemma": lambda: _changed("sentencepiece", normalizers.Replace(" ", "▁")),
    "bert": lambda: _changed("wordpiece", normalizers.BertNormalizer(lowercase=True)),
}
NORMALISING = tuple(MAKERS)


@functools.cache
def normalising(kind: str) -> PreTrainedTokenizerFast:
    """The session's tokenizer of that kind; do not change it."""
    return four_tokenizers.wrapped(MAKERS[kind]())


DENORMAL = (
    "e\u0301", "a\u0323\u0302", "u\u031b\u0309", "\u1112\u1161\u11ab", "\uac00\u11a8", "か\u3099", "ハ\u309a",
    "\uff76\uff9e", "\u0995\u09c7\u09be", "क\u093c", "\u0958", "\u0b95\u0bc6\u0bbe", "\u0438\u0306", "\u0627\u0653",
    "\u212b", "\ufb01", "\ufb03", "\uff21", "\u2460", "\u00bd", "\ufdfa", "\u200b", "\u200d", "\u200c", "\u00ad",
    "\ufeff", "\ufe0f", "\u2764\ufe0f", "1\ufe0f\u20e3", "\x00", "\x07", "\ufffd", "\u200f", "\u202e", "\u0130", "ß",
    "''", "``", "\u00a0", "\u3000", "  ", "\n", " ", "▁", "\u0301", "\u0323", "\u0e33", "\u0f71\u0f72", "a", "Le", "x",
    "q\u0301\u0323", "ש\u05bc\u05c1",
)  # fmt: skip

denormal_texts = st.lists(
    st.one_of(
        st.sampled_from(DENORMAL), st.sampled_from([*NASTY, *MARKS, *CLUSTERS]),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=3),
    ),
    max_size=10,
).map("".join)  # fmt: skip
"""Decomposed letters, Jamo, half and full width, ligatures, joiners, controls and marks in every order."""
