"""New models from a line of settings, and models that must not be loaded."""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny_models as tiny
from tiny_gguf import write_gguf
from xkd_schemas.errors import InputMissing, Refused, UsageError, XkdError
from xkd_trainer.models.architecture import num_layers
from xkd_trainer.models.forward import empty_model
from xkd_trainer.models.loading import check_model_name, load_model, load_tokenizer, new_model, source_of

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


@pytest.mark.parametrize("spec", ["llama,kv_heads=2,tie_word_embeddings=false", "gpt2"])
def test_a_new_model_has_the_sizes_that_were_asked_for(spec: str) -> None:
    model = new_model(f"{spec},layers=3,width=32,heads=4,inner=48", vocab_size=101, special=SPECIAL)

    config = model.config
    assert num_layers(model) == 3
    assert tuple(model.get_input_embeddings().weight.shape) == (101, 32)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tied, getattr(config, "num_key_value_heads", 4)) == ((True, 4) if spec == "gpt2" else (False, 2))
    assert config.num_attention_heads == 4
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    shapes = {tuple(p.shape) for p in model.parameters()}
    assert shapes & {(48, 32), (32, 48)}, f"no feed-forward of width 48 in {sorted(shapes)}"


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (192, 3)])
def test_a_new_model_has_a_head_for_64_of_its_width(width: int, heads: int) -> None:
    model = new_model(f"llama,layers=1,width={width}", vocab_size=20, special=SPECIAL)

    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (heads, heads)
    assert model.config.intermediate_size == 4 * width


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lama,layers=2", r"--student new:lama,layers=2: .*lama"),
        ("llama,depth=2", r"llama has no setting 'depth'"),
        ("llama,layers", r"'layers' is not key=value"),
        ("llama,width=10,heads=4", r"--student new:llama,width=10,heads=4: "),
        ("gpt2,width=10,heads=4", r"--student new:gpt2,width=10,heads=4: "),
        ("llama,layers=many", r"--student new:llama,layers=many: "),
        ("llama,layers=0", r"--student new:llama,layers=0: "),
    ],
)
def test_settings_that_make_no_model_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        new_model(spec, vocab_size=20, special=SPECIAL)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny.saved(tiny.llama("byte_level"), "byte_level", tmp_path / "model")


def test_a_saved_model_comes_back_in_the_asked_for_type_and_in_evaluation_mode(saved: Path) -> None:
    loaded = load_model(str(saved), dtype=torch.bfloat16)

    assert not loaded.training
    assert loaded.dtype == torch.bfloat16
    model = tiny.llama("byte_level").bfloat16()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["./nowhere/model", "/nowhere/at/all", "nowhere/model.gguf"])
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputMissing, match=name.replace(".", r"\.")):
        load_model(name, dtype=torch.float32)
    with pytest.raises(InputMissing, match="is not there"):
        load_tokenizer(name)


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")

    with pytest.raises(Refused, match=r"no safetensors weights; pickled weights are not opened"):
        load_model(str(saved), dtype=torch.float32)


WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.mark.parametrize(
    ("file", "broken", "message"),
    [
        (WEIGHTS, lambda content: content[: len(content) // 2], "broken weights"),
        (WEIGHTS, lambda _: b"", "broken weights"),
        (WEIGHTS, lambda content: b"\xff" * 64 + content[64:], "broken weights"),
        (CONFIG, lambda _: b"{", r"config\.json is not JSON"),
        (CONFIG, lambda _: b'{"model_type": "no_such_family"}', "no_such_family|cannot be loaded"),
        (
            CONFIG,
            lambda content: content.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 64'),
            "cannot be",
        ),
    ],
)
def test_a_damaged_model_folder_is_an_error_of_one_line(
    saved: Path, file: str, broken: Callable[[bytes], bytes], message: str
) -> None:
    (saved / file).write_bytes(broken((saved / file).read_bytes()))

    with pytest.raises((UsageError, InputMissing), match=message) as caught:
        load_model(str(saved), dtype=torch.float32)
    assert str(saved) in str(caught.value)


def test_a_folder_without_tokenizer_and_a_damaged_tokenizer_are_named(saved: Path) -> None:
    half, config = saved / "tokenizer.json", saved / "config.json"
    whole = half.read_bytes()
    half.write_bytes(whole[:1000])
    with pytest.raises(InputMissing, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(str(saved))
    for path, old, new in ((half, b'"special"', b'"specIal"'), (config, b'"float32"', b'"flo`t32"')):
        half.write_bytes(whole)
        path.write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(InputMissing, match=r"no tokenizer in this folder that can be read"):
            load_tokenizer(str(saved))

    for path in saved.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputMissing, match=r"no tokenizer in this folder"):
        load_tokenizer(str(saved))


def test_a_name_that_is_no_folder_is_said_on_a_terminal_before_the_hub_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for terminal, name in ((False, "someone/none"), (True, str(tmp_path)), (True, "someone/none\x1b[31m")):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        with contextlib.suppress(InputMissing):
            source_of(name, weights=False)
    assert capsys.readouterr().err == "someone/none[31m: no such folder here, asking the Hugging Face hub\n"


def test_a_saved_tokenizer_does_not_depend_on_being_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tokenizer_of("unigram").save_pretrained(tmp_path / "t")
    for name, offline in (("saved", False), ("offline", True)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        load_tokenizer(str(tmp_path / "t")).save_pretrained(tmp_path / name)

    saved, offline = ((tmp_path / name / "tokenizer_config.json").read_text() for name in ("saved", "offline"))
    assert saved == offline
    assert not json.loads(saved).get("local_files_only")


CODE = "open({ran!r}, 'w').close()\n"
CLASSES = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
ASKS = {
    "auto_map": {"text_config": [{"auto_map": CLASSES}]},
    "attn_implementation": {"attn_implementation": "someone/kernel"},
    "_attn_implementation": {"text_config": {"_attn_implementation": {"": "someone/kernel@main:attention"}}},
    "experts_implementation": {"experts_implementation": "someone/kernel"},
}  # fmt: skip


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the hub, someone/model, as an earlier download left it: the folder of its only commit."""
    store, commit = tmp_path / "hub/models--someone--model", "0123456789abcdef0123456789abcdef01234567"
    folder = store / "snapshots" / commit
    tiny.saved(tiny.llama("byte_level"), "byte_level", folder)
    (folder / "evil.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    (store / "refs").mkdir()
    (store / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return folder


LOADERS = {
    "model": lambda name: load_model(name, dtype=torch.float32),
    "tokenizer": load_tokenizer,
    "sizes": empty_model,
    "name": check_model_name,
}


def test_a_model_of_the_hub_is_loaded_at_the_commit_that_was_looked_at(on_the_hub: Path) -> None:
    for load in LOADERS.values():
        load("someone/model")
    assert source_of("someone/model", weights=False)[1]["revision"] == on_the_hub.name


@pytest.mark.parametrize(
    ("loader", "place", "file", "key"),
    [
        *((loader, place, "config", "auto_map") for loader in LOADERS for place in ("hub", "folder", "gguf")),
        *(("model", "hub", "config", key) for key in ASKS if key != "auto_map"),
        ("model", "hub", "tokenizer_config", "auto_map"),
    ],
)
def test_code_and_kernels_are_refused_wherever_a_model_comes_from(
    on_the_hub: Path, tmp_path: Path, loader: str, place: str, file: str, key: str
) -> None:
    settings = on_the_hub / f"{file}.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | ASKS[key]))
    (on_the_hub / "m.gguf").touch()
    name = {"hub": "someone/model", "folder": str(on_the_hub), "gguf": str(on_the_hub / "m.gguf")}[place]

    with pytest.raises(Refused, match=rf"/{file}\.json has {key}, which can run code"):
        LOADERS[loader](name)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_nobody_is_asked_whether_code_may_run(
    on_the_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    monkeypatch.setattr("xkd_trainer.models.loading.check_config", lambda _folder: None)
    settings = {"model_type": "none-of-ours", "auto_map": CLASSES}
    for file in ("config.json", "tokenizer_config.json"):
        (on_the_hub / file).write_text(json.dumps(settings))

    with pytest.raises(XkdError):
        LOADERS[loader]("someone/model")
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("loader", ["model", "tokenizer", "sizes"])
def test_a_damaged_gguf_is_an_error_of_one_line(gguf: Path, tmp_path: Path, loader: str) -> None:
    content, path = gguf.read_bytes(), tmp_path / "half.gguf"
    path.write_bytes(content)
    LOADERS[loader](str(path))
    ends = [0, 3, 10, 24, 100, len(content) // 8, len(content) // 5]
    ends += [len(content) // 2, len(content) - 1] if loader == "model" else []  # the others read no weights
    token = content.index(b"tokens") + 30  # the length of a word: a later one is not in the file
    for damaged in (*(content[:end] for end in ends), content[:token] + b"\xff" * 7 + content[token + 7 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputMissing, match=re.escape(str(path))):
            LOADERS[loader](str(path))
