"""Tiny random models of causal families; `python tests/fakes/families.py` prints what is to be had of each.

test_families.py measures every entry; the table of docs/families.md is this one.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny_models import seeded

VOCABULARY: Final = 500

SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "n_inner": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "max_position_embeddings": 128, "sliding_window": 4,
    "window_size": 4, "attention_window_size": 4, "lru_width": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
    "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_n_groups": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "attn_pdrop_prob": 0.0,
    "logits_scaling": 8.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
"""What a family has of these is set, so that a document of 14 tokens is longer than every window."""

ALL: Final = (-1,)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type with its settings, and what is expected of it."""

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    outer: Mapping[str, Any] | None = None
    """Of a model that has its text model's settings in `text_config`: the others."""
    inner: bool = True
    """Whether states of inner layers can be read."""
    shift: int = 0
    """transformers' own list of hidden states begins so many blocks late."""
    rows: tuple[int, ...] = ALL
    """Blocks with an attention row that can be read, from 1; the last one counts for SRA's default."""
    refused: str = ""
    """Words of the refusal, as teacher and as student."""
    packs: bool = True
    """Whether it keeps several documents of one row apart."""
    streams: bool = True
    """Whether its blocks can be run one after another, each for many documents."""
    capped: bool = False
    """Soft-capped logits: no student, and no teacher of SRA and DWA."""

    def tiny(self, vocabulary: int) -> PretrainedConfig:
        shape = AutoConfig.for_model(self.kind).get_text_config()
        settings = {key: value for key, value in SIZES.items() if _is_number(shape, key)} | dict(self.config)
        settings |= {key: vocabulary for key in ("vocab_size", "vocab_size_per_layer_input") if key in settings}
        if self.outer is not None:
            return AutoConfig.for_model(self.kind, text_config=settings, **self.outer)
        return AutoConfig.for_model(self.kind, **settings)

    def tells_last_row(self) -> bool:
        return self.rows == ALL or self.config.get("num_hidden_layers", SIZES["num_hidden_layers"]) in self.rows

    def made(self, vocabulary: int = VOCABULARY) -> PreTrainedModel:
        """The model, float32, with weights large enough that attention and predictions are far from uniform."""
        return seeded(AutoModelForCausalLM.from_config, self.tiny(vocabulary), 0)


def _is_number(config: PretrainedConfig, key: str) -> bool:
    """Whether a configuration has a number of that name that can be set; some vary from layer to layer."""
    if isinstance(getattr(type(config), key, None), property):
        return False
    try:
        return isinstance(getattr(config, key, None), int | float)
    except RuntimeError:
        return False


def _each(*kinds: str, **expected: Any) -> dict[str, Family]:
    return {kind: Family(kind=kind, **expected) for kind in kinds}


_MLA: Final = {"head_dim": 4, "num_key_value_heads": 4}
_LINEAR: Final = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "num_hidden_layers": 4}  # fmt: skip
_MAMBAS: Final = {"layer_types": ["mamba", "mamba", "attention"], "num_key_value_heads": 2}
_SHARED_KEYS: Final = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

FAMILIES: Final[Mapping[str, Family]] = {
    **_each(
        "gpt2", "gpt_bigcode", "gpt_neox", "ctrl", "llama", "mistral", "ministral3", "mixtral",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma3_text", "phi", "phi3", "phimoe", "stablelm",
        "starcoder2", "persimmon", "olmo", "olmo2", "olmo3", "olmoe", "granite", "granitemoe", "cohere", "cohere2",
        "smollm3", "glm", "glm4", "ernie4_5", "seed_oss", "helium", "exaone4", "arcee", "gpt_oss",
        "llama4_text", "minimax_m2", "bitnet",
    ),
    **_each("opt", "biogpt", "gpt_oss", packs=False),
    "opt, norms after": Family(kind="opt", config={"do_layer_norm_before": False}, packs=False),
    "opt, narrow embeddings (350m)": Family(
        kind="opt", config={"word_embed_proj_dim": 16, "do_layer_norm_before": False}, inner=False, packs=False
    ),
    "qwen2, windows from layer 2": Family(kind="qwen2", config={"use_sliding_window": True, "max_window_layers": 1}),
    "nemotron": Family(kind="nemotron", config={"num_key_value_heads": 2, "head_dim": 8}),
    "deepseek_v2": Family(kind="deepseek_v2", config={**_MLA, "num_experts_per_tok": 2}),
    **_each("deepseek_v3", "minicpm3", config=_MLA),
    "gemma3, with images": Family(
        kind="gemma3",
        outer={"vision_config": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 14,
                                 "intermediate_size": 16, "patch_size": 14}, "mm_tokens_per_image": 1},
    ),
    **_each("gemma2", "nanochat", capped=True),
    "gemma3n_text": Family(
        kind="gemma3n_text", config={**_SHARED_KEYS, "activation_sparsity_pattern": None, "laurel_rank": 4},
        inner=False, capped=True, streams=False,
    ),
    "gemma4_text": Family(kind="gemma4_text", config={**_SHARED_KEYS, "head_dim": 8, "global_head_dim": 8,
                                                      "num_attention_heads": 4, "num_key_value_heads": 2},
                          streams=False),
    **_each("falcon", "bloom", "mpt", "xglm", "openai-gpt", rows=(), packs=False),
    "diffllama": Family(kind="diffllama", rows=()),
    "falcon, alibi": Family(kind="falcon", config={"alibi": True}, rows=(), packs=False),
    "falcon, grouped keys": Family(
        kind="falcon", config={"new_decoder_architecture": True, "num_kv_heads": 2}, rows=(), packs=False
    ),
    "gpt_neo": Family(kind="gpt_neo", config={"attention_types": [[["global", "local"], 2]], "num_hidden_layers": 4},
                      rows=()),
    **_each("gptj", "codegen", config={"rotary_dim": 4}, rows=()),
    **_each("mamba", "falcon_mamba", shift=1, rows=(), packs=False),
    "rwkv": Family(kind="rwkv", shift=1, rows=(), packs=False, streams=False),
    "mamba2": Family(
        kind="mamba2", config={"num_heads": 8, "head_dim": 8, "n_groups": 1}, shift=1, rows=(), packs=False
    ),
    "recurrent_gemma": Family(
        kind="recurrent_gemma", config={"block_types": ["recurrent", "recurrent", "attention"]}, rows=(3,),
        capped=True, packs=False,
    ),
    "bamba": Family(kind="bamba", config={"attn_layer_indices": [2]}, rows=(3,), packs=False),
    "jamba": Family(kind="jamba", config={"attn_layer_offset": 2, "attn_layer_period": 3}, rows=(3,), packs=False),
    "granitemoehybrid": Family(kind="granitemoehybrid", config=_MAMBAS, rows=(3,), packs=False),
    "lfm2": Family(
        kind="lfm2", config={"layer_types": ["conv", "full_attention", "full_attention"]}, rows=(2, 3), packs=False
    ),
    **_each("qwen3_next", "qwen3_5_text", config=_LINEAR, rows=(4,), packs=False),
    **_each("bert", "roberta", "modernbert-decoder", refused="no linear head on its last states"),
    "electra": Family(kind="electra", refused="its head takes 128"),
    **_each("bert-generation", "xlm", refused="depend on tokens that come later"),
    "bert-generation, is_decoder": Family(kind="bert-generation", config={"is_decoder": True}, packs=False),
    "reformer": Family(
        kind="reformer",
        config={
            "is_decoder": True, "num_attention_heads": 2, "attention_head_size": 16, "axial_pos_embds_dim": [16, 16],
            "axial_pos_shape": [8, 8], "max_position_embeddings": 64, "attn_layers": ["local", "local"],
        },
        refused="its last states are 64 wide",
    ),
}  # fmt: skip
"""By the name that the table gives it."""

HERE: Final = {name: family for name, family in FAMILIES.items() if family.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
"""Those that this transformers ships."""


def row_of(name: str, family: Family) -> str:
    if family.refused:
        return f"| {name} | refused: {family.refused} | | | | |"
    rows = "every block" if family.rows == ALL else ", ".join(map(str, family.rows)) or "refused"
    states = "every block" if family.inner else "last"
    student = "refused: soft-capped head" if family.capped else "yes"
    if not family.capped and not family.rows:
        student = "yes, SRA with `weights=uniform`"
    if not family.capped and not family.inner:
        student = "yes, with losses of the last states"
    packs, streams = ("yes" if able else "refused" for able in (family.packs, family.streams))
    return f"| {name} | {states} | {rows} | {student} | {packs} | {streams} |"


def table() -> str:
    head = "| family | states | attention row | as student | packing | streamed |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(row_of(*item) for item in FAMILIES.items()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
