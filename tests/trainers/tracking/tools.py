"""Tiny models of several libraries' kinds, and batches with padding, for the tests of tracking."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, set_seed

import hf_models  # noqa: F401 - registers our architectures

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "post_norm": ("vanilla_transformer", {"norm_position": "post", "dropout": 0.0}),
    "pre_norm": ("vanilla_transformer", {"norm_position": "pre", "dropout": 0.0}),
    "connection": ("connection_transformer", {"num_slots": 8, "connection_rank": 4, "dropout": 0.0}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "llama": ("llama", {"num_key_value_heads": 2}),
    "gemma2": ("gemma2", {"num_key_value_heads": 2, "head_dim": 4, "attn_logit_softcapping": 5.0}),
    "gpt_neox": ("gpt_neox", {}),
    "bart": (
        "bart",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        },
    ),
    "t5": ("t5", {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 2}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
}


def make_model(name: str, kernel: str = "sdpa", seed: int = 0, sharpen: float = 6.0, **values) -> PreTrainedModel:
    """A model of two layers, width 16 and 4 heads, with weights scaled up so that attention is not uniform."""
    set_seed(seed)
    model_type, sizes = SIZES[name]
    encoder_decoder = model_type in ("vanilla_transformer", "connection_transformer", "bart", "t5")
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 32} | TOKENS
    if encoder_decoder:
        sizes |= {"num_decoder_layers": 2, "decoder_start_token_id": 1}
    for left_out in {"bart": ("hidden_size",), "t5": ("hidden_size",), "gpt2": ("hidden_size",)}.get(name, ()):
        sizes.pop(left_out)
    config = AutoConfig.for_model(model_type, **(sizes | values))
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=None if name in ("bloom", "gemma2") else kernel)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(word in parameter_name for word in ("q_proj.weight", "k_proj.weight", "c_attn.weight")):
                parameter *= sharpen
    return model.eval()


def make_batch(model: PreTrainedModel, rows: int = 4, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with padding at the end of every second row; labels too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, length - 3 :] = 0
    ids = ids * mask
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    labels = torch.randint(3, 40, (rows, length - 2), generator=generator)
    labels[::2, length - 4 :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
