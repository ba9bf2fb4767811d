"""Four kinds of tokenizer, trained in a second on text written here, and the hostile text that tests put through them.

`tokenizer_of(kind)` is cached for the session; `KINDS` names the kinds; `chat_tokenizer()` is the byte-level one with
a chat template. Nothing is read from disk or from a network.
"""

import functools
import itertools
import json

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hostile_text import CLUSTERS, MARKS, NASTY
from xkd_schemas.documents import Document, document_of
from xkd_schemas.text.encode import Encoder

KINDS = ("byte_level", "sentencepiece", "unigram", "wordpiece")

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
CHAT_SPECIALS = ["<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "The old lamp on the harbour wall was lit every evening, and nobody knew who lit it.",
    "A fisherman said that the keeper had moved to the city; his sister laughed and said nothing at all.",
    "Please write a short answer. What is the capital of a country that has two capitals?",
    "def area(width, height):\n    return width * height\n\n\tprint(area(12, 3.50))  # 42.0 metres",
    "In 1987 they counted 12,345 birds, 67 boats and 8 bridges within 90 minutes.",
    "naïve café façade, Ångström, œuvre, straße, ﬁnal ﬂow, ½ of ①②③, ＡＢＣ",
    "東京の夜は静かです。今日は本を読みました。漢字とかなとカナ。",
    "我们在河边走了很久，天气很好，谁也没有说话。",
    "السلام عليكم، كيف حالك اليوم؟ الكتاب على الطاولة.",
    "שלום עולם, הספר על השולחן.",
    "🙂 good morning 👩‍👩‍👧 family 🇩🇪 flag 👍🏽 thumbs ❤️ heart 🙂🙂",
    "xin chào, tôi đang đọc một quyển sách; dòng sông chảy chậm",
)


def corpus() -> list[str]:
    """Training text: every sentence, and sentences glued together so that blanks and newlines are learned too."""
    pairs = [f"{a}\n\n{b}  {a[::-1]}" for a, b in itertools.pairwise(SENTENCES)]
    return [*SENTENCES, *pairs] * 4


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1_000, special_tokens=[*SPECIALS, *CHAT_SPECIALS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Llama's: blanks become U+2581 in the normaliser, unknown characters become byte tokens, a start token."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), behavior="isolated")
    common = [text for text in corpus() if text.isascii()]  # so that byte tokens are needed for the rest
    specials = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(common, trainer)
    vocabulary = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


BUILDERS = {
    "byte_level": _byte_level, "sentencepiece": _sentencepiece, "unigram": _unigram, "wordpiece": _wordpiece,
}  # fmt: skip


def fresh(kind: str) -> PreTrainedTokenizerFast:
    """A new tokenizer of that kind, for a test that changes it."""
    return wrapped(Tokenizer.from_str(_serialised(kind)))


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The `tokenizers` object in transformers' clothes, with the special tokens named."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@functools.cache
def _serialised(kind: str) -> str:
    return str(BUILDERS[kind]().to_str())


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """The session's tokenizer of that kind; do not change it."""
    return fresh(kind)


def encoder_of(kind: str, max_tokens: int = 1000, template: str = "none") -> Encoder:
    return Encoder(tokenizer=tokenizer_of(kind), template=template, max_tokens=max_tokens)


@functools.cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a chat template whose turns end with <|im_end|>."""
    tokenizer = fresh("byte_level")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


NASTY_PIECES = (*NASTY, *CLUSTERS, *MARKS, "area(12, 3)", "①", "漢", "▁", "<s>", "</s>", "\U000e0061")

nasty_text = st.lists(
    st.one_of(st.sampled_from(NASTY_PIECES), st.text(st.characters(exclude_categories=("Cs",)), max_size=3)),
    max_size=14,
).map("".join)
"""Text of emoji with joiners, combining marks, CJK, right-to-left, controls, NUL and runs of blanks."""


def question(prompt: str, response: str) -> Document:
    return document_of([("prompt", prompt, False), ("response", response, True)], source="q.jsonl", line=3)


def turns(texts: list[str]) -> Document:
    parts = [(("user", "assistant")[i % 2], text, i % 2 == 1) for i, text in enumerate(texts)]
    return document_of(parts, source="m", line=1)


def lone(text: str) -> Document:
    """A text without turns."""
    return document_of([("text", text, True)], source="t", line=1)


nasty_documents = st.one_of(
    st.builds(question, nasty_text, nasty_text), st.builds(lone, nasty_text),
    st.builds(turns, st.lists(nasty_text, max_size=4)),
)  # fmt: skip
