"""The Vanilla Transformer's weights inside `torch.nn.Transformer`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_models.vanilla_transformer import VanillaTransformerConfig
from hf_models.vanilla_transformer.convert_vanilla_transformer import expected_tensors

from ..errors import UserError


class TorchTransformer(nn.Module):
    """A Vanilla Transformer whose layers are those of `torch.nn.Transformer`, for inference.

    Embeddings, positions and the output map are the given model's own modules. A padding mask is not taken: every
    token of every row counts.

    Args:
        model: a `VanillaTransformerForConditionalGeneration`, whose weights are copied into the layers.

    Raises:
        UserError: the model is another one.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        config: Any = model.config
        if type(model).__name__ != "VanillaTransformerForConditionalGeneration":
            raise UserError(
                f"compare: torch.nn.Transformer takes the weights of a VanillaTransformerForConditionalGeneration, "
                f"not of a {type(model).__name__}"
            )
        self.encoder_input = nn.ModuleList([model.model.encoder.embed_tokens, model.model.encoder.embed_positions])
        self.decoder_input = nn.ModuleList([model.model.decoder.embed_tokens, model.model.decoder.embed_positions])
        self.core = build_core(config, model.dtype).to(model.device)
        self.core.load_state_dict(convert_to_torch(model.state_dict(), config))
        self.lm_head = model.lm_head
        self.eval()

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): source tokens, none of them padding.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`): target tokens.

        Returns:
            Logits of shape `(batch_size, target_length, vocab_size)`.
        """
        source, target = self.embed(self.encoder_input, input_ids), self.embed(self.decoder_input, decoder_input_ids)
        causal = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device, dtype=target.dtype
        )
        return self.lm_head(self.core(source, target, tgt_mask=causal, tgt_is_causal=True))

    @staticmethod
    def embed(modules: nn.ModuleList, tokens: torch.Tensor) -> torch.Tensor:
        embed_tokens, embed_positions = modules
        position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        return embed_positions(embed_tokens(tokens), position_ids)


def build_core(config: VanillaTransformerConfig, dtype: torch.dtype) -> nn.Transformer:
    """`torch.nn.Transformer` of a configuration's sizes, without dropout, with random weights."""

    def final_norm() -> nn.LayerNorm | None:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else None

    sizes: dict[str, Any] = {
        "d_model": config.hidden_size,
        "nhead": config.num_attention_heads,
        "dim_feedforward": config.intermediate_size,
        "dropout": 0.0,
        "activation": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "batch_first": True,
        "norm_first": config.norm_position == "pre",
    }
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**sizes), config.num_hidden_layers, final_norm(), enable_nested_tensor=False
    )
    num_decoder_layers = config.num_decoder_layers or config.num_hidden_layers
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), num_decoder_layers, final_norm())
    core = nn.Transformer(
        config.hidden_size,
        config.num_attention_heads,
        custom_encoder=encoder,
        custom_decoder=decoder,
        batch_first=True,
    )
    return core.to(dtype)


def convert_to_torch(state: dict[str, torch.Tensor], config: VanillaTransformerConfig) -> dict[str, torch.Tensor]:
    """Rename and stack the layers' weights as `torch.nn.Transformer` holds them.

    Args:
        state: state dict of a `VanillaTransformerForConditionalGeneration`.
        config: its configuration.

    Returns:
        The state dict of `build_core(config)`: queries, keys and values stacked in `in_proj`; no embeddings.
    """
    prefix = "core."
    return {
        theirs.removeprefix(prefix): torch.cat([state[name] for name in ours])
        for theirs, ours in expected_tensors(config).items()
        if theirs.startswith(prefix)
    }
