"""A benepar model small enough to be trained inside a test: a random 2-layer BERT that learns six trees by heart."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import nltk
import torch
from benepar.decode_chart import ChartDecoder
from benepar.nkutil import HParams
from benepar.parse_chart import ChartParser
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from xkd_pipeline.parsing.benepar_parser import answer_special_tokens

TREES = (
    "(TOP (S (NP (DT The) (NN fox)) (VP (VBD saw) (NP (DT a) (NN dog))) (. .)))",
    "(TOP (S (NP (PRP He)) (VP (VBD slept)) (. .)))",
    "(TOP (S (NP (NNS Ships)) (VP (VBD passed) (PP (IN in) (NP (DT the) (NN dark)))) (. .)))",
    "(TOP (S (NP (DT The) (NN lamp)) (VP (VBD went) (PRT (RP out))) (. .)))",
    "(TOP (S (VP (VB Go) (RB away))))",
    "(TOP (FRAG (NP (NN Rain))))",
)
MAX_POSITIONS = 40
"""Sub-words of the longest sentence the model takes."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Example:
    """A gold tree in the shape that benepar trains on."""

    tree: nltk.Tree

    @property
    def words(self) -> list[str]:
        return self.tree.leaves()

    @property
    def space_after(self) -> list[bool]:
        return [True] * len(self.words)

    def leaves(self) -> list[str]:
        return self.words

    def pos(self) -> list[tuple[str, str]]:
        return self.tree.pos()


def train_tiny_benepar(folder: Path, *, steps: int = 120) -> Path:
    """Train on TREES until they come back exactly, and save in the layout of a released model."""
    torch.manual_seed(0)
    examples = [Example(nltk.Tree.fromstring(tree)) for tree in TREES]
    parser = _untrained(folder, examples)
    optimizer = torch.optim.Adam(parser.parameters(), lr=3e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TreeCRF.*arg_constraints")
        for _ in range(steps):
            parser.train()
            optimizer.zero_grad()
            for _, batch in parser.encode_and_collate_subbatches(examples, 500):
                parser.compute_loss(batch).backward()
            optimizer.step()
    _save(parser, folder)
    return folder


def _untrained(folder: Path, examples: list[Example]) -> ChartParser:
    """A parser with random weights; its tokenizer and encoder configuration are written to `folder`."""
    words = sorted({word.lower() for example in examples for word in example.words})
    vocab = [*SPECIAL, *words, *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(vocab))}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=MAX_POSITIONS,
    ).save_pretrained(folder)  # fmt: skip
    BertConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=MAX_POSITIONS,
    ).save_pretrained(folder)  # fmt: skip
    hparams = HParams(
        use_chars_lstm=False, use_pretrained=True, pretrained_model="tiny", use_encoder=False, predict_tags=False,
        d_model=48, d_label_hidden=48, force_root_constituent=True,
    )  # fmt: skip
    labels = ChartDecoder.build_vocab([example.tree for example in examples])
    with answer_special_tokens():
        return ChartParser(
            tag_vocab={"UNK": 0}, label_vocab=labels, char_vocab={"\0": 0}, hparams=hparams,
            pretrained_model_path=os.fspath(folder),
        )  # fmt: skip


def _save(parser: ChartParser, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["benepar"] = parser.config
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(parser.state_dict(), folder / "benepar_model.bin")  # the only format that benepar reads
