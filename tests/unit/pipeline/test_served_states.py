"""Hidden states as vLLM and speculators write them, and the largest log-probabilities as DistillKit packs them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

import four_tokenizers
import small_cache
from small_cache import asked, made, refused
from xkd_pipeline.capture.capture import TeacherSettings
from xkd_pipeline.capture.stage import teacher_of
from xkd_pipeline.served.distillkit import Compression, unpack_integers, unpack_log_probabilities
from xkd_schemas.cache.table import Table
from xkd_schemas.codecs import numbers_of
from xkd_schemas.config import RunConfig
from xkd_trainer.data.collate import batch_of
from xkd_trainer.training.prepare import set_up

LAYERS = (2, 4)
K = 6


@pytest.fixture(scope="module")
@torch.no_grad()
def passes() -> list[dict[str, torch.Tensor]]:
    """Of each document of the small cache: ids, states of two layers (the last one not normed), and logits."""
    model, found = teacher_of(TeacherSettings(model=str(made() / "teacher"), dtype="float32")), []
    last: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out))
    for row in Table(made() / "cache", "teachers/T"):
        ids_T = torch.tensor(row["token_ids"].tolist())
        out = model(ids_T[None], output_hidden_states=True)
        states = torch.stack([out.hidden_states[2][0], last.pop()[0]], dim=1)
        found.append({"token_ids": ids_T, "hidden_states": states, "logits": out.logits[0]})
    handle.remove()
    return found


@pytest.fixture(scope="module")
def cache(passes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a teacher that was captured with the same signals, and its student."""
    cache = small_cache.copied(tmp_path_factory.mktemp("states"))
    wanted = f"hidden@2,topk_ids#{K},topk_logits#{K},logsumexp"
    assert asked("add", cache, "--model", made() / "teacher", "--to", "T", "--signals", wanted)[0] == 0
    return cache


def typed(cache: Path, rows: Path, name: str, *more: object) -> tuple[object, ...]:
    return ("import", cache, rows, "--model", made() / "teacher", "--name", name, "--template", "chat", *more)


def rows_of(cache: Path) -> list[Any]:
    return list(Table(cache, "teachers/T", [Table(cache, "signals/T.1")]))


def test_files_of_hidden_states_become_what_a_capture_keeps(passes: Any, cache: Path, tmp_path: Path) -> None:
    for number, one in enumerate(passes):
        save_file({name: one[name] for name in ("token_ids", "hidden_states")}, tmp_path / f"{number}.safetensors")

    code, said = asked(*typed(cache, tmp_path, "H", "--layers", "2,4", "--recompute", 5))

    assert (code, said["refused"], said["recomputed"]) == (0, {}, 5)
    assert said["signals"] == ["hidden@2", "hidden_last"]
    for ours, theirs in zip(Table(cache, "teachers/H"), rows_of(cache), strict=True):
        for column in said["signals"]:
            np.testing.assert_allclose(numbers_of(ours[column]), numbers_of(theirs[column]), rtol=2**-6, atol=1e-3)
    sizes = [Table(cache, f"teachers/{name}").manifest.constants for name in ("H", "T")]
    assert sizes[0]["hidden_std"] == pytest.approx(sizes[1]["hidden_std"], rel=1e-3)
    assert sizes[0]["embedding_std"] == sizes[1]["embedding_std"]


def test_states_that_do_not_fit_are_refused(passes: Any, cache: Path, tmp_path: Path) -> None:
    good = {name: passes[0][name] for name in ("token_ids", "hidden_states")}
    spoilt = {
        "one layer more": good | {"hidden_states": good["hidden_states"][:, :1].contiguous()},
        "a token less": good | {"hidden_states": good["hidden_states"][1:].contiguous()},
        "infinite": good | {"hidden_states": good["hidden_states"] / 0},
        "narrow": good | {"hidden_states": good["hidden_states"][..., 1:].contiguous()},
        "no ids": {"hidden_states": good["hidden_states"]},
    }
    said = {}
    for name, tensors in spoilt.items():
        folder = tmp_path / name.replace(" ", "")
        folder.mkdir()
        save_file(tensors, folder / "a.safetensors")
        said[name] = refused(*typed(cache, folder, f"X{len(said)}", "--layers", "2,4"))
    (tmp_path / "a.safetensors").write_bytes(b"x" * 99)

    tokens = len(good["token_ids"])
    assert f"states of {tokens} x 1 x 32 for {tokens} tokens and --layers 2,4" in said["one layer more"]
    assert f"states of {tokens - 1} x 2 x 32" in said["a token less"]
    assert "hidden@2 is not finite" in said["infinite"]
    assert "states of width 31 are none of this model" in said["narrow"]
    assert "has no token_ids" in said["no ids"]
    assert "is broken" in refused(*typed(cache, tmp_path / "a.safetensors", "Y"))
    assert "--layers x: not numbers" in refused(*typed(cache, tmp_path, "Y", "--layers", "x"))
    flags = ("--tokenizer", made() / "teacher", "--layers", "2,4")
    save_file(good, tmp_path / "a.safetensors")
    assert "add --model" in refused("import", cache, tmp_path / "a.safetensors", *flags)


# DistillKit


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Integers [P, n] as bits, the highest first, end to end."""
    texts = ["".join(f"{int(number):0{bits}b}" for number in row) for row in numbers]
    return np.array([[int(t[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(t), 8)] for t in texts], np.uint8)


def raw(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return torch.from_numpy(values).bfloat16().contiguous().view(torch.uint8).numpy().reshape(len(values), -1)
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(len(values), -1)


EXACT = {"exact_k": K, "residual_bins": [], "delta_encoding": False}
CODED = {
    "exact_k": 2, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"], "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 3},
                      {"scale_dtype": "float32", "element_bits": 1, "num_elements": 1}],
    "delta_encoding": True, "error_diffusion": False, "normalize_t": False,
}  # fmt: skip


def packed(log_p_Pk: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """Sorted log-probabilities as DistillKit packs them."""
    values = np.diff(log_p_Pk, axis=1, prepend=0) if how["delta_encoding"] else log_p_Pk
    parts = [raw(values[:, : how["exact_k"]], how.get("exact_dtype", "float32"))]
    rest = values[:, how["exact_k"] :]
    if terms := how.get("polynomial_terms"):
        places = np.arange(rest.shape[1], dtype=np.float64)
        curve = np.stack([places**t if isinstance(t, int) else getattr(np, t)(places) for t in terms], 1)
        weights = np.linalg.lstsq(curve, rest.T, rcond=None)[0].T.astype(np.float32)
        parts.append(raw(weights, how["term_dtype"]))
        rest = rest - weights @ curve.T
    for one in how["residual_bins"]:
        mine, rest = rest[:, : one["num_elements"]], rest[:, one["num_elements"] :]
        bits = one["element_bits"]
        most = 1 if bits == 1 else 2 ** (bits - 1)
        scale = (np.abs(mine).max(1, keepdims=True) / most).astype(one["scale_dtype"])
        low, high = (0, 1) if bits == 1 else (-most, most - 1)
        parts += [raw(scale, one["scale_dtype"]), pack(np.clip(np.round(mine / scale), low, high) - low, bits)]
    return np.concatenate(parts, axis=1)


def write(passes: Any, how: dict[str, Any], folder: Path, pad: int | None = None) -> Path:
    """A data set as DistillKit's sampling writes it; with `pad` behind each text."""
    folder.mkdir()
    classes = passes[0]["logits"].shape[1]
    bits, rows = int(np.ceil(np.log2(classes))), []
    for one in passes:
        values, ids = one["logits"].double().log_softmax(-1).topk(K)
        end = slice(None) if pad is not None else slice(-1)
        rows.append(
            {"input_ids": one["token_ids"].tolist() + ([] if pad is None else [pad]),
             "compressed_logprobs": packed(values.numpy()[end], how).tolist(),
             "bytepacked_indices": pack(ids.numpy()[end], bits).tolist()}
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_0.parquet", row_group_size=4)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump({"d": classes, "k": K, **how}))
    return folder


@pytest.mark.parametrize("padded", [False, True])
def test_packed_log_probabilities_become_the_largest_logits_of_a_capture(
    passes: Any, cache: Path, padded: bool, tmp_path: Path
) -> None:
    name = f"D{int(padded)}"
    pad = four_tokenizers.chat_tokenizer().pad_token_id if padded else None

    code, said = asked(*typed(cache, write(passes, EXACT, tmp_path / "d", pad), name, "--recompute", 3))

    assert (code, said["refused"], said["recomputed"]) == (0, {}, 3)
    for ours, theirs in zip(Table(cache, f"teachers/{name}"), rows_of(cache), strict=True):
        expected = theirs[f"topk_logits#{K}"] - theirs["logsumexp"][:, None]
        np.testing.assert_allclose(ours[f"topk_logits#{K}"], expected, atol=1e-4)
        assert not ours["logsumexp"].any()
        assert (ours[f"topk_ids#{K}"] == theirs[f"topk_ids#{K}"]).mean() > 0.99


@torch.no_grad()
def test_uld_learns_from_them_without_the_teachers_weights(passes: Any, cache: Path, tmp_path: Path) -> None:
    folder = write(passes, EXACT, tmp_path / "d")
    flags = ("--tokenizer", made() / "teacher", "--template", "chat", "--name", "U")
    assert asked("import", cache, folder, *flags)[0] == 0
    found = []
    for teacher in ("U", "T"):
        student = ("--student", made() / "student", "--teacher", teacher, "--name", f"of-{teacher}")
        assert asked("align", cache, *student)[0] == 0
        student = {"model": "new:llama,layers=1,width=16", "tokenizer": str(made() / "student")}
        run = {"cache": str(cache), "student": student, "train": {"loss": "ce=0+uld"}}
        ready = set_up(RunConfig.model_validate(run | {"losses": {"uld": {"teacher": "topk"}}}), f"of-{teacher}")
        batch = batch_of(ready.cache, range(12), ready.wanted)
        found.append(float(ready.distiller(batch, ready.distiller.counts(batch), 0)[0]))

    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_curve_bins_and_differences_are_undone() -> None:
    generator = np.random.default_rng(0)
    log_p_Pk = -np.sort(generator.exponential(2.0, (7, K)), axis=1)
    how = Compression.model_validate({"d": 500, "k": K, **CODED})

    found = unpack_log_probabilities(packed(log_p_Pk, CODED), how)

    plain = unpack_log_probabilities(packed(log_p_Pk, EXACT), Compression.model_validate({"d": 500, "k": K, **EXACT}))
    np.testing.assert_array_equal(plain, log_p_Pk.astype(np.float32))
    np.testing.assert_allclose(found, log_p_Pk, atol=0.08)
    with pytest.raises(ValueError, match="bytes a position"):
        unpack_log_probabilities(packed(log_p_Pk, CODED)[:, :-1], how)
    numbers = generator.integers(0, 2**11, (3, 9))
    assert unpack_integers(pack(numbers, 11), 11, 9).tolist() == numbers.tolist()


def test_packed_rows_that_do_not_fit_are_refused(passes: Any, cache: Path, tmp_path: Path) -> None:
    folder = write(passes, EXACT, tmp_path / "d")
    config = folder / "compression_config.yaml"
    right = config.read_text()

    config.write_text(right.replace(f"k: {K}", f"k: {K + 1}"))
    assert "do not fit compression_config.yaml" in refused(*typed(cache, folder, "Z"))
    config.write_text("k: 3")
    other = write(passes, EXACT, tmp_path / "e")
    (other / "compression_config.yaml").unlink()

    assert "compression_config.yaml: No such file" in refused(*typed(cache, other, "Z"))
