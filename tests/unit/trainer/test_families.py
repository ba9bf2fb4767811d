"""What the trainer reads of every family of families.py, against transformers' own states and eager attention maps."""

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_models as tiny
from families import ALL, HERE, Family, table
from xkd_schemas.errors import UsageError
from xkd_trainer.data.batch import Batch
from xkd_trainer.data.collate import batch_of
from xkd_trainer.losses.declaration import StudentPass
from xkd_trainer.models.architecture import blocks_of, head_of, num_layers
from xkd_trainer.models.forward import States, check_model, rehearse, run
from xkd_trainer.models.loading import load_model, new_model
from xkd_trainer.models.padding import plan_rows
from xkd_trainer.models.streaming import check_steps, load_streamed
from xkd_trainer.training.distiller import Distiller
from xkd_trainer.training.prepare import Ready, set_up

LENGTHS = (9, 1, 6, 14)
CLASSES = len(tiny.tokenizer_of(tiny.STUDENT_TOKENIZER))
UNIFORM = r"Next: use weights that need no attention map: --set losses\.sra\.weights=uniform"


def those(which: Callable[[Family], object]) -> pytest.MarkDecorator:
    """The families of this transformers for which it is so, by name."""
    return pytest.mark.parametrize("name", [name for name, family in HERE.items() if which(family)])


def batch() -> tuple[Tensor, Tensor]:
    return tiny.ids_and_valid(LENGTHS, CLASSES)


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """The family's model, which no test changes."""
    return HERE[name].made(CLASSES)


@functools.cache
def folder_of(name: str) -> str:
    """That model saved: a teacher, and a student of the session's cache."""
    folder = tiny.tiny_cache().root / f"family-{list(HERE).index(name)}"
    model_of(name).save_pretrained(folder)
    return str(folder)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal within rounding of numbers as large as the largest."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0.0, atol=1e-4, msg=what)


@functools.cache
@torch.no_grad()
def alone(name: str) -> list[Any]:
    """What transformers makes of each document by itself, with states and, where a family has them, eager maps."""
    model, (ids_BL, _), asked = HERE[name].made(CLASSES), batch(), {"output_hidden_states": True, "use_cache": False}
    model.set_attn_implementation("eager")
    asked |= {"output_attentions": bool(HERE[name].rows)}
    return [model(input_ids=ids_BL[row : row + 1, :length], **asked) for row, length in enumerate(LENGTHS)]


@those(lambda f: not f.refused)
@torch.no_grad()
def test_a_saved_teacher_has_the_states_and_logits_of_each_document_alone(name: str) -> None:
    family, (ids_BL, valid_BL) = HERE[name], batch()
    model = load_model(folder_of(name), dtype=torch.float32)
    check_model(model)
    count = num_layers(model)

    states = run(model, ids_BL, valid_BL, layers=range(1, count + 1) if family.inner else ())

    for row, (one, length) in enumerate(zip(alone(name), LENGTHS, strict=True)):
        for layer, found in states.layers.items():
            index = layer if layer == count else layer - family.shift
            close(found[row, :length], one.hidden_states[index][0], f"layer {layer} of document {row}")
        close(head_of(model)(states.last_BLD[row, :length]), one.logits[0], f"logits of document {row}")
    check_streamed(family, folder_of(name), states)


def check_streamed(family: Family, folder: str, whole: States) -> None:
    """One block after another gives the very bits of a pass through all of them, or is refused by name."""
    if not family.streams:
        with pytest.raises(UsageError, match=r"ForCausalLM .*Next: --no-stream-layers"):
            check_steps(load_streamed(folder, dtype=torch.float32, device="cpu"))
        return
    model, states_BLD = load_streamed(folder, dtype=torch.float32, device="cpu"), None
    check_steps(model)
    for number in model.stream.sweep():
        layers = [number] if number in whole.layers else []
        states, states_BLD = model.stream.step(number, states_BLD, partial(run, model, *batch(), layers=layers))
        assert all(torch.equal(states.layers[layer], whole.layers[layer]) for layer in layers), number
    assert torch.equal(states.last_BLD, whole.last_BLD)


@those(lambda f: f.rows and not f.refused)
@torch.no_grad()
def test_attention_rows_are_those_of_the_eager_maps_and_listening_changes_no_bit(name: str) -> None:
    family, (ids_BL, valid_BL) = HERE[name], batch()
    model = model_of(name)
    count = num_layers(model)
    layers = tuple(range(1, count + 1)) if family.rows == ALL else family.rows

    before, names = run(model, ids_BL, valid_BL).last_BLD, dict(ALL_ATTENTION_FUNCTIONS)

    rehearse(model, attention=count in layers, attention_layers=layers)
    states = run(model, ids_BL, valid_BL, attention_layers=layers)

    assert torch.equal(before[valid_BL], states.last_BLD[valid_BL])
    assert dict(ALL_ATTENTION_FUNCTIONS) == names
    for row, (one, length) in enumerate(zip(alone(name), LENGTHS, strict=True)):
        maps = one.attentions
        maps = maps if len(maps) == len(layers) else [maps[layer - 1] for layer in layers]
        for layer, map_1HLL in zip(layers, maps, strict=True):
            row_L = map_1HLL[0, :, length - 1].sum(0)
            found = states.attention_layers[layer][row]
            torch.testing.assert_close(found[:length], row_L / row_L.sum(), rtol=0.0, atol=1e-5, msg=f"block {layer}")
            assert float(found[length:].abs().sum()) == 0.0
    for layer in set(range(1, count + 1)) - set(layers):
        with pytest.raises(UsageError, match=rf"no attention map in (block {layer}|its last block)\. {UNIFORM}"):
            run(model, ids_BL, valid_BL, attention_layers=(layer,))


@those(lambda f: not f.refused)
@torch.no_grad()
def test_documents_of_one_row_have_the_states_and_rows_of_each_alone_or_packing_is_refused(name: str) -> None:
    family, (ids_BL, valid_BL) = HERE[name], batch()
    model = model_of(name)
    if not family.packs:
        with pytest.raises(UsageError, match=f"^{type(model).__name__} cannot keep documents of one row apart"):
            rehearse(model, packing=True)
        return
    rehearse(model, packing=True)
    assert plan_rows(valid_BL) is not None
    reads = {
        "layers": range(1, num_layers(model) + 1) if family.inner else (),
        "attention_layers": range(1, num_layers(model) + 1) if family.rows == ALL else family.rows,
        "text_layers": (num_layers(model),) if family.tells_last_row() else (),
        "text_B": torch.tensor([7, 0, 3, 11]),
    }

    apart, packed = (run(model, ids_BL, valid_BL, packing=packing, **reads) for packing in (False, True))

    close(packed.last_BLD[valid_BL], apart.last_BLD[valid_BL], "last states")
    for layer, states in apart.layers.items():
        close(packed.layers[layer][valid_BL], states[valid_BL], f"layer {layer}")
    for name in ("attention_layers", "text_layers"):
        found, expected = getattr(packed, name), getattr(apart, name)
        assert found.keys() == expected.keys()
        for layer, rows in expected.items():
            torch.testing.assert_close(found[layer], rows, rtol=0.0, atol=1e-5, msg=f"block {layer}")


@those(lambda f: not f.rows)
def test_a_family_that_shows_no_attention_says_so_in_one_line_before_anything_runs(name: str) -> None:
    with pytest.raises(UsageError, match=rf"(no|several) attention maps? in its last block\. {UNIFORM}"):
        rehearse(HERE[name].made(), attention=True)


@those(lambda f: not f.inner)
def test_inner_layers_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"block 1 gives states of shape .* Next: use losses that read no inner"):
        rehearse(HERE[name].made(), layers=(1,))


@those(lambda f: f.refused)
def test_what_is_no_causal_model_under_a_linear_head_is_refused(name: str) -> None:
    model = HERE[name].made().train()

    with pytest.raises(UsageError, match=HERE[name].refused):
        check_model(model)

    assert model.training


ROUNDED = ["llama", "gpt2", "gemma2", "gpt_oss", "granite", "bloom", "mamba", "recurrent_gemma"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_of_half_precision_is_no_reason_to_refuse_a_model(name: str, dtype: torch.dtype) -> None:
    model = HERE[name].made().to(dtype)

    check_model(model)
    rehearse(model, layers=(1, 3), attention=HERE[name].tells_last_row())


@those(lambda f: not f.refused and not f.capped)
def test_a_student_learns_from_ce_mta_sra_and_dwa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = seen_by_losses(monkeypatch)
    made = distiller(name, "ce+mta+sra+dwa" if HERE[name].inner else "ce+sra+dwa")
    model, one = made.distiller.student, batch_of(made.cache, (3, 19, 0), made.wanted)

    loss, _ = made.distiller(one, made.distiller.counts(one), 0)
    loss.backward()

    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    table_Vd = model.get_input_embeddings().weight
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes)
    assert sum(bool(slope.any()) for slope in slopes) > 0.6 * len(slopes) > 10
    assert table_Vd.grad.any()
    rows_BNd, valid_BN = passes[0].target_embeddings_BNd, one.predict_valid_BN
    assert torch.equal(rows_BNd[valid_BN], table_Vd[one.target_BN][valid_BN])


def seen_by_losses(monkeypatch: pytest.MonkeyPatch) -> list[StudentPass]:
    seen: list[StudentPass] = []
    plain = Distiller._losses

    def watched(self: Distiller, one: Batch, passed: StudentPass, *rest: Any) -> Any:
        seen.append(passed)
        return plain(self, one, passed, *rest)

    monkeypatch.setattr(Distiller, "_losses", watched)
    return seen


def distiller(name: str, loss: str) -> Ready:
    """A student of the family on the session's cache; SRA's weights are uniform where it shows no last row."""
    sra = {} if HERE[name].tells_last_row() else {"weights": "uniform"}
    tokenizer = str(tiny.tiny_cache().student)
    made = tiny.tiny_cache().run(
        loss=loss, losses={"sra": sra}, student__model=folder_of(name), student__tokenizer=tokenizer
    )
    return set_up(made, "")


@those(lambda f: f.capped)
def test_a_student_with_a_soft_capped_head_is_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(UsageError, match=r"student .* cannot use a head with soft-capped logits \(cap \d"):
        distiller(name, "ce")


NEW = (
    "gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3", "gpt_neox", "stablelm",
    "starcoder2", "olmo2", "granite", "cohere2", "smollm3", "bloom", "mpt", "falcon", "xglm", "gpt_bigcode",
)  # fmt: skip


@pytest.mark.parametrize("kind", NEW)
def test_a_new_student_of_a_family_has_the_sizes_asked_for_and_passes_the_checks(kind: str) -> None:
    special: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    model = new_model(f"{kind},layers=2,width=32,heads=4", vocab_size=101, special=special)

    check_model(model)

    assert len(blocks_of(model)) == num_layers(model) == 2
    assert tuple(model.get_input_embeddings().weight.shape) == (101, 32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bert,layers=2,width=32", "no linear head on its last states"),
        ("gptj,layers=2,width=32,heads=4", "its sizes do not fit together"),
        ("gemma2,layers=2,width=32", "soft-capped logits"),
        ("reformer,layers=2", "is_decoder=True"),
        ("prophetnet,layers=2", "num_decoder_layers"),
        ("marian,layers=2,width=32,heads=4", "found no list of 2 blocks"),
    ],
)
def test_new_students_that_cannot_be_used_are_refused_in_one_line(spec: str, message: str) -> None:
    run_file = tiny.tiny_cache().run(
        loss="ce+sra", student__model=f"new:{spec}", student__tokenizer=str(tiny.tiny_cache().student)
    )

    with pytest.raises(UsageError, match=message):
        set_up(run_file, "")


def test_the_table_of_the_docs_is_the_one_that_is_tested() -> None:
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")

    assert table() in text
