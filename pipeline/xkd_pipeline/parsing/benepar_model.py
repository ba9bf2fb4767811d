"""Finding and loading a benepar 0.2.0 model under transformers 5, and what its labels mean."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from xkd_schemas.errors import BadData, InputMissing, Refused

LABELS: Final = ("NP", "VP")


@contextlib.contextmanager
def special_tokens_answered() -> Iterator[None]:
    """Let benepar 0.2.0 load under transformers 5, which has lost `build_inputs_with_special_tokens`.

    benepar asks it once, while loading, which special tokens stand round one sentence.
    """
    from transformers import PreTrainedTokenizerBase

    def with_special_tokens(self: Any, token_ids: list[int]) -> list[int]:
        encoded = self("a", return_special_tokens_mask=True)
        special = [bool(flag) for flag in encoded["special_tokens_mask"]]
        first = special.index(False)
        last = len(special) - special[::-1].index(False)
        ids = list(encoded["input_ids"])
        return [*ids[:first], *token_ids, *ids[last:]]

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
    if path.is_dir():
        _check_config(path / "config.json")
    return path


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read: {error}", fix="name the folder of a benepar model") from error
    if "auto_map" in json.dumps(config):
        raise Refused(f"{path} names code of its own to run (auto_map)", fix="use a model without custom code")
    if not isinstance(config, dict) or "benepar" not in config:
        raise BadData(f"{path} has no entry 'benepar'", fix="name the folder of a benepar model")


def load_model(path: Path) -> Any:
    """benepar's ChartParser from `path`, on the CPU.

    Raises:
        BadData: the files do not make a model.
    """
    import torch
    from benepar.parse_chart import ChartParser

    # what torch raises for a file that is no list of tensors; the class lives in a module that nothing here imports
    not_tensors = (vars(torch.serialization)["pickle"].UnpicklingError, EOFError, struct.error)
    try:
        with special_tokens_answered():
            return ChartParser.from_trained(str(path)).eval()
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, *not_tensors) as error:
        line = " ".join(str(error).split())[:200]
        raise BadData(f"{path} cannot be loaded as a benepar model: {line}", fix="copy it again") from error


def phrase_labels(label_vocab: dict[str, int]) -> dict[int, str]:
    """NP or VP by label index, for the labels that have it.

    benepar writes a chain of constituents over the same words as one label, S::VP; the outermost NP or VP counts.

    >>> phrase_labels({"": 0, "S::VP": 1, "NP": 2, "WHNP": 3})
    {1: 'VP', 2: 'NP'}
    """
    chains = {index: [part for part in label.split("::") if part in LABELS] for label, index in label_vocab.items()}
    return {index: chain[0] for index, chain in chains.items() if chain}
