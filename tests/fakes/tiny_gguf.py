"""A small Llama with the byte-level tokenizer as a GGUF file."""

import json
from pathlib import Path

from gguf import GGUFWriter

import tiny_models as tiny

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path) -> Path:
    model, tokenizer = tiny.llama("byte_level", tied=False), tiny.tokenizer_of("byte_level")
    config, writer = model.config, GGUFWriter(path, "llama")
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    keys = {
        "name": "tiny", "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
        "rope_dimension_count": config.hidden_size // config.num_attention_heads,
        "tokenizer_model": "gpt2", "tokenizer_pre": "default",
        "token_list": sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get),
        "token_types": [3 if n in tokenizer.added_tokens_decoder else 1 for n in range(len(tokenizer))],
        "token_merges": [" ".join(pair) for pair in described["merges"]],
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    for name, weight in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
