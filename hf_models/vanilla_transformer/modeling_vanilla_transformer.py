"""The Transformer of "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762), written out in PyTorch."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    MultipleChoiceModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vanilla_transformer import VanillaTransformerConfig

# Written into every saved config.json, so that each Auto class finds its model whichever head was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_vanilla_transformer.VanillaTransformerConfig",
    "AutoModel": "modeling_vanilla_transformer.VanillaTransformerModel",
    "AutoModelForSeq2SeqLM": "modeling_vanilla_transformer.VanillaTransformerForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_vanilla_transformer.VanillaTransformerForSequenceClassification",
    "AutoModelForMultipleChoice": "modeling_vanilla_transformer.VanillaTransformerForMultipleChoice",
}


def make_position_ids(
    attention_mask: torch.Tensor | None, length: int, past_length: int | torch.Tensor = 0, device=None
) -> torch.Tensor:
    """
    Numbers the real tokens of each sequence from 0, so that padding on either side never moves a token.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, past_length + length)`, *optional*):
            1 for real tokens, 0 for padding. Without it, or with an already expanded four-dimensional mask, every
            token counts as real.
        length (`int`): Number of tokens to number, which are the last ones of the mask.
        past_length (`int`, *optional*, defaults to 0): Number of tokens before them; a mask counts them itself.
        device (`torch.device`, *optional*): Where the result is wanted.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`, or `(1, length)` without a mask.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(length, device=device).unsqueeze(0) + past_length
    position_ids = (attention_mask.to(device).long().cumsum(-1) - 1).clamp(min=0)
    return position_ids[:, -length:]


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int, dtype: torch.dtype = torch.float32):
    """
    Position encodings of section 3.5: `PE(pos, 2k) = sin(pos / 10000^(2k / d))` and `PE(pos, 2k + 1) = cos(same)`.

    They are computed where they are needed rather than kept in a table: nothing has to be saved or restored,
    half-precision models keep exact angles, and no length is too long.

    Args:
        position_ids (`torch.LongTensor` of any shape): Positions, in tokens.
        hidden_size (`int`): d, even.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the result.

    Returns:
        `torch.FloatTensor` of shape `(*position_ids.shape, hidden_size)`, with sines and cosines interleaved.
    """
    precision = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=precision) / hidden_size
    angles = position_ids.unsqueeze(-1).to(precision) * torch.pow(10000.0, -exponents)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


def make_decoder_inputs(labels: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int | None):
    """
    Shifts labels one place to the right and puts the start token directly before the first real label, so that labels
    may be padded on either side.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, length)`): Target tokens, padded with -100.
        pad_token_id (`int`): Token that stands where there is no label.
        decoder_start_token_id (`int`): First token of every sequence.

    Returns:
        `(decoder_input_ids, decoder_attention_mask)`, each a `torch.LongTensor` of shape `(batch_size, length)`; the
        mask is 0 on padding before the start token only, since causal attention never reaches padding at the end.

    Raises:
        ValueError: one of the two tokens is not set.
    """
    if pad_token_id is None or decoder_start_token_id is None:
        raise ValueError(
            f"labels cannot be shifted: pad_token_id={pad_token_id} and "
            f"decoder_start_token_id={decoder_start_token_id} must both be set in the config"
        )
    start = (labels != -100).long().argmax(dim=-1, keepdim=True)
    decoder_input_ids = torch.full_like(labels, pad_token_id)
    decoder_input_ids[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad_token_id)
    decoder_input_ids.scatter_(1, start, decoder_start_token_id)
    decoder_attention_mask = (torch.arange(labels.shape[1], device=labels.device) >= start).long()
    return decoder_input_ids, decoder_attention_mask


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in single precision, or in double precision if it has that already: losses need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def token_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
):
    """
    Label-smoothed cross entropy (section 5.4): `(1 - eps) * nll + eps * mean over the vocabulary of -log p`, in nats.

    Args:
        logits (`torch.FloatTensor` of shape `(..., num_classes)`): Unnormalised log probabilities.
        labels (`torch.LongTensor` of shape `(...)`): Targets; -100 is left out.
        label_smoothing (`float`, *optional*, defaults to 0.0): eps, in [0, 1].
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Number of targets in the whole batch of which this is a part. The sum is divided by it, so that the losses
            of the parts add up to the mean of the whole. Without it, the number of targets here.

    Returns:
        `torch.FloatTensor` of shape `()`; 0 where there is no target at all.
    """
    labels = labels.to(logits.device)
    total = nn.functional.cross_entropy(
        full_precision(logits.flatten(0, -2)), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
):
    """
    Scaled dot-product attention (equation 1), step by step: `softmax(Q K^T * scaling + mask) V`.

    Args:
        query, key, value (`torch.FloatTensor` of shape `(batch_size, num_heads, length, head_dim)`): Q, K and V.
        attention_mask (`torch.FloatTensor` of shape `(batch_size, 1, query_length, key_length)`, *optional*):
            Added to the scores: 0 where a key is visible, the lowest number where it is hidden.
        scaling (`float`): 1 / sqrt(head_dim).
        dropout (`float`, *optional*, defaults to 0.0): Dropout probability of the weights.

    Returns:
        The output of shape `(batch_size, query_length, num_heads, head_dim)` and the weights before dropout, of shape
        `(batch_size, num_heads, query_length, key_length)`, whose rows sum to 1.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    attention_weights = scores.softmax(dim=-1)
    dropped_weights = nn.functional.dropout(attention_weights, p=dropout, training=module.training)
    attention_output = torch.matmul(dropped_weights, value)
    return attention_output.transpose(1, 2).contiguous(), attention_weights


class VanillaTransformerAttention(nn.Module):
    """
    Multi-head attention (section 3.2.2): over its own input, or over `key_value_states` as encoder-decoder attention.

    Args:
        config ([`VanillaTransformerConfig`]): The model's configuration.
        layer_idx (`int`, *optional*): Number of the layer, which is its place in the cache.
        is_causal (`bool`, *optional*, defaults to `False`): Whether later positions are hidden.
    """

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int | None = None, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor):
        """`(batch_size, length, hidden_size)` to `(batch_size, num_heads, length, head_dim)`."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.q_proj(hidden_states))
        is_cross_attention = key_value_states is not None
        if is_cross_attention and past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            # The source does not change while the target grows: its keys and values are computed once.
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = cached.keys, cached.values
        else:
            source = key_value_states if is_cross_attention else hidden_states
            key, value = self.split_heads(self.k_proj(source)), self.split_heads(self.v_proj(source))
            if past_key_values is not None and is_cross_attention:
                key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
            elif past_key_values is not None:
                key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, attention_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(attention_output.flatten(-2)), attention_weights


class VanillaTransformerFeedForward(nn.Module):
    """Position-wise feed-forward network (section 3.3, equation 2): `W2 act(W1 x + b1) + b2`."""

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class VanillaTransformerPositionalEncoding(nn.Module):
    """
    Turns token embeddings into the input of the first layer: scaled by `sqrt(hidden_size)` (section 3.4), plus
    positions (section 3.5), with dropout (section 5.4).
    """

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__()
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.learned = None
        if config.position_embedding_type == "learned":
            self.learned = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if self.learned is None:
            positions = sinusoidal_positions(position_ids, inputs_embeds.shape[-1], inputs_embeds.dtype)
        else:
            fits = position_ids < self.learned.num_embeddings
            rule = f"a sequence is longer than max_position_embeddings={self.learned.num_embeddings} learned positions"
            if is_torchdynamo_compiling():
                # The library's check asks for a number, at which a compiled graph ends.
                torch._assert_async(fits.all(), rule)
            else:
                torch_compilable_check(fits, rule)
            positions = self.learned(position_ids)
        return self.dropout(inputs_embeds * self.scale + positions)


def add_residual(
    hidden_states: torch.Tensor,
    sublayer: Callable[[torch.Tensor], torch.Tensor],
    norm: nn.Module,
    dropout: nn.Module,
    pre_norm: bool,
) -> torch.Tensor:
    """
    One sublayer with its residual connection, dropout and LayerNorm: `norm(x + dropout(sublayer(x)))` (section 3.1 and
    5.4), or with `pre_norm` `x + dropout(sublayer(norm(x)))` (Xiong et al. 2020, arXiv:2002.04745).
    """
    if pre_norm:
        return hidden_states + dropout(sublayer(norm(hidden_states)))
    return norm(hidden_states + dropout(sublayer(hidden_states)))


class VanillaTransformerEncoderLayer(GradientCheckpointingLayer):
    """One encoder layer (section 3.1): self-attention, then the feed-forward network."""

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.self_attn = VanillaTransformerAttention(config)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = VanillaTransformerFeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        def self_attention(states):
            return self.self_attn(states, attention_mask=attention_mask, **kwargs)[0]

        hidden_states = add_residual(hidden_states, self_attention, self.self_attn_norm, self.dropout, self.pre_norm)
        return add_residual(hidden_states, self.feed_forward, self.feed_forward_norm, self.dropout, self.pre_norm)


class VanillaTransformerDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer (section 3.1): causal self-attention, attention over the encoder's output, feed-forward."""

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.self_attn = VanillaTransformerAttention(config, layer_idx=layer_idx, is_causal=True)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = VanillaTransformerAttention(config, layer_idx=layer_idx)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = VanillaTransformerFeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        def self_attention(states):
            return self.self_attn(states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)[0]

        def cross_attention(states):
            return self.cross_attn(
                states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )[0]

        hidden_states = add_residual(hidden_states, self_attention, self.self_attn_norm, self.dropout, self.pre_norm)
        hidden_states = add_residual(hidden_states, cross_attention, self.cross_attn_norm, self.dropout, self.pre_norm)
        return add_residual(hidden_states, self.feed_forward, self.feed_forward_norm, self.dropout, self.pre_norm)


class VanillaTransformerPreTrainedModel(PreTrainedModel):
    """What all Vanilla Transformer classes share: loading, saving and the attention kernels they support."""

    config: VanillaTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VanillaTransformerEncoderLayer", "VanillaTransformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in the library; the saved config names the class of every head, not only of the one that is saved."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # The library resizes input and output embeddings; an untied target embedding is ours to resize.
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.is_encoder_decoder and not self.config.tie_word_embeddings:
            decoder = self.get_decoder()
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, embeddings.num_embeddings, mean_resizing=mean_resizing
            )
        return embeddings


class VanillaTransformerEncoder(VanillaTransformerPreTrainedModel):
    """The stack of encoder layers (section 3.1) with the source embedding."""

    _can_record_outputs = {
        "hidden_states": VanillaTransformerEncoderLayer,
        "attentions": VanillaTransformerAttention,
    }
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = VanillaTransformerPositionalEncoding(config)
        self.layers = nn.ModuleList([VanillaTransformerEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): Source tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 0 hides padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, source_length, hidden_size)`, *optional*):
                Token embeddings, before scaling, in place of `input_ids`.

        Returns:
            [`BaseModelOutput`] with `last_hidden_state` of shape `(batch_size, source_length, hidden_size)`.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        position_ids = make_position_ids(attention_mask, inputs_embeds.shape[1], device=inputs_embeds.device)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states = self.embed_positions(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


DECODER_STATES = OutputRecorder(VanillaTransformerDecoderLayer)
# Where negative indices given as `output_hidden_states` start to count. Set as an attribute, because transformers 5.17
# does not know it as an argument.
DECODER_STATES.num_hidden_layers_key = "num_decoder_layers"


class VanillaTransformerDecoder(VanillaTransformerPreTrainedModel):
    """The stack of decoder layers (section 3.1) with the target embedding."""

    _can_record_outputs = {
        "hidden_states": DECODER_STATES,
        "attentions": OutputRecorder(VanillaTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(VanillaTransformerAttention, index=1, layer_name="cross_attn"),
    }
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = VanillaTransformerPositionalEncoding(config)
        self.layers = nn.ModuleList(
            [VanillaTransformerDecoderLayer(config, layer_idx) for layer_idx in range(config.num_decoder_layers)]
        )
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Target tokens; those that are in
                the cache already are left out.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + length)`, *optional*): 0 hides padding.
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch_size, source_length, hidden_size)`):
                Output of the encoder.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*):
                0 hides source padding.
            past_key_values ([`EncoderDecoderCache`], *optional*): Keys and values of earlier target tokens and of the
                source.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`, *optional*):
                Token embeddings, before scaling, in place of `input_ids`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): Whether to return the cache.
            position_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Positions, in tokens; by
                default counted from the mask.

        Returns:
            [`BaseModelOutputWithPastAndCrossAttentions`] with `last_hidden_state` of shape
            `(batch_size, length, hidden_size)`.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of decoder_input_ids and decoder_inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

        if position_ids is None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = make_position_ids(
                attention_mask, inputs_embeds.shape[1], past_length, device=inputs_embeds.device
            )
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=None if past_key_values is None else past_key_values.self_attention_cache,
        )
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        hidden_states = self.embed_positions(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask,
                # Positional, because gradient checkpointing passes gradients through positional arguments only.
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )


class VanillaTransformerModel(VanillaTransformerPreTrainedModel):
    r"""
    The Transformer without a head (Vaswani et al. 2017, arXiv:1706.03762, Figure 1). With
    `config.is_encoder_decoder=False` it is the encoder alone.

    Args:
        config ([`VanillaTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerModel

    >>> config = VanillaTransformerConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = VanillaTransformerModel(config)
    >>> source, target = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[1, 8, 9]])
    >>> model(input_ids=source, decoder_input_ids=target).last_hidden_state.shape
    torch.Size([1, 3, 16])
    ```
    """

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        self.encoder = VanillaTransformerEncoder(config)
        if config.is_encoder_decoder:
            self.decoder = VanillaTransformerDecoder(config)
        else:
            self._tied_weights_keys = {}
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        if self.config.is_encoder_decoder and self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput | BaseModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`, *optional*): Source tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*):
                1 for real source tokens, 0 for padding on either side.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens, beginning with `decoder_start_token_id`.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, past_length + target_length)`, *optional*):
                1 for real target tokens, 0 for padding on either side. Later tokens are hidden in any case.
            encoder_outputs ([`BaseModelOutput`] or `tuple`, *optional*): Output of an earlier pass of the encoder.
            past_key_values ([`EncoderDecoderCache`], *optional*): Cache of an earlier pass of the decoder.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, source_length, hidden_size)`, *optional*):
                Source embeddings, before scaling, in place of `input_ids`.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, hidden_size)`, *optional*):
                Target embeddings, before scaling, in place of `decoder_input_ids`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): Whether to return `past_key_values`.
            decoder_position_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Positions of the target tokens; by default counted from `decoder_attention_mask`.

        Returns:
            [`Seq2SeqModelOutput`] with `last_hidden_state` of shape `(batch_size, target_length, hidden_size)`, or the
            encoder's [`BaseModelOutput`] when `config.is_encoder_decoder=False`. With `output_hidden_states=True` and
            `output_attentions=True` (the latter under `attn_implementation="eager"`) it also holds, per layer, states
            of shape `(batch_size, length, hidden_size)` and weights of shape
            `(batch_size, num_heads, query_length, key_length)`.

        Raises:
            ValueError: not exactly one of token ids and embeddings is given, for the source or for the target.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if not self.config.is_encoder_decoder:
            return encoder_outputs

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            position_ids=decoder_position_ids,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class VanillaTransformerForConditionalGeneration(VanillaTransformerPreTrainedModel, GenerationMixin):
    r"""
    The Transformer that writes a target sequence for a source sequence: logits are the decoder's output times the
    transposed embedding matrix, without a bias (section 3.4).

    Args:
        config ([`VanillaTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration

    >>> config = VanillaTransformerConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = VanillaTransformerForConditionalGeneration(config)
    >>> source, labels = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[8, 9, 2]])
    >>> model(input_ids=source, labels=labels).logits.shape
    torch.Size([1, 3, 100])
    >>> model.generate(source, max_new_tokens=5).shape[0]
    1
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: VanillaTransformerConfig):
        if not config.is_encoder_decoder:
            raise ValueError("VanillaTransformerForConditionalGeneration needs a config with is_encoder_decoder=True")
        super().__init__(config)
        self.model = VanillaTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """
        Arguments are those of [`VanillaTransformerModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens, padded with -100 on either side. The decoder's input is made of them by a shift to the
                right, unless it is given.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels in the whole batch of which this is a part; see the loss below.

        Returns:
            [`Seq2SeqLMOutput`] with `logits` of shape `(batch_size, target_length, vocab_size)` and, with labels, the
            `loss`: cross entropy with `config.label_smoothing`, in nats, summed over the real labels and divided by
            `num_items_in_batch`, or by their number here.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids, real_labels_mask = make_decoder_inputs(
                    labels, self.config.pad_token_id, self.config.decoder_start_token_id
                )
                if decoder_attention_mask is None:
                    decoder_attention_mask = real_labels_mask

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            decoder_position_ids=decoder_position_ids,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = token_cross_entropy(logits, labels, self.config.label_smoothing, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_inputs_for_generation(self, input_ids, decoder_attention_mask=None, **kwargs):
        """
        As in the library, and with the target positions: a static cache turns the mask into four dimensions, from which
        they could no longer be counted.
        """
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs
        )
        is_countable = decoder_attention_mask is not None and decoder_attention_mask.dim() == 2
        if is_countable and "decoder_position_ids" not in model_inputs:
            length = model_inputs["decoder_input_ids"].shape[1]
            model_inputs["decoder_position_ids"] = make_position_ids(decoder_attention_mask, length)
        return model_inputs


def encoder_config(config: VanillaTransformerConfig) -> VanillaTransformerConfig:
    """A copy of `config` that describes the encoder alone."""
    config = copy.deepcopy(config)
    config.is_encoder_decoder = False
    return config


def mean_over_tokens(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None):
    """
    Average of the real tokens' states.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`): States.
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for real tokens; all by default.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, hidden_size)`.
    """
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weights = attention_mask.to(hidden_states.device, hidden_states.dtype).unsqueeze(-1)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class VanillaTransformerForSequenceClassification(VanillaTransformerPreTrainedModel):
    r"""
    The encoder with a linear classifier over the mean of the real tokens' states. It has no decoder; the encoder of a
    saved [`VanillaTransformerForConditionalGeneration`] can be loaded into it.

    Args:
        config ([`VanillaTransformerConfig`]): The model's configuration; `num_labels` is the number of classes.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForSequenceClassification

    >>> config = VanillaTransformerConfig(
    ...     vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    ... )
    >>> model = VanillaTransformerForSequenceClassification(config)
    >>> model(input_ids=torch.tensor([[5, 6, 7, 2]])).logits.shape
    torch.Size([1, 3])
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(encoder_config(config))
        self.num_labels = config.num_labels
        self.model = VanillaTransformerModel(self.config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 0 hides padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`, *optional*):
                Token embeddings, before scaling, in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size,)`, or `torch.FloatTensor`, *optional*):
                Classes in [0, num_labels) for cross entropy; numbers of shape `(batch_size,)` or
                `(batch_size, num_labels)` for regression; 0 or 1 of shape `(batch_size, num_labels)` for several labels
                at once. `config.problem_type` chooses; if it is `None`, one label means regression, integers mean
                classes, and other types mean several labels.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of label entries in the whole batch of which this is a part; the summed loss is divided by it.

        Returns:
            [`SequenceClassifierOutput`] with `logits` of shape `(batch_size, num_labels)`.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        pooled = mean_over_tokens(outputs.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.compute_loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch):
        """The loss of `forward`: cross entropy in nats, squared error, or binary cross entropy in nats."""
        problem_type = self.config.problem_type
        if problem_type is None:
            if self.num_labels == 1:
                problem_type = "regression"
            elif not labels.is_floating_point():
                problem_type = "single_label_classification"
            else:
                problem_type = "multi_label_classification"
        if problem_type == "single_label_classification":
            return token_cross_entropy(logits, labels.flatten(), num_items_in_batch=num_items_in_batch)
        elementwise = (
            nn.functional.mse_loss if problem_type == "regression" else nn.functional.binary_cross_entropy_with_logits
        )
        logits = full_precision(logits)
        total = elementwise(logits, labels.to(logits).view_as(logits), reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = logits.numel()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


class VanillaTransformerForMultipleChoice(VanillaTransformerPreTrainedModel):
    r"""
    The encoder with a linear score over the mean of the real tokens' states, computed for each choice on its own. It
    has no decoder; the encoder of a saved [`VanillaTransformerForConditionalGeneration`] can be loaded into it.

    Args:
        config ([`VanillaTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForMultipleChoice

    >>> config = VanillaTransformerConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = VanillaTransformerForMultipleChoice(config)
    >>> question_with_each_answer = torch.tensor([[[5, 6, 7, 2], [5, 6, 8, 2]]])
    >>> model(input_ids=question_with_each_answer).logits.shape
    torch.Size([1, 2])
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(encoder_config(config))
        self.model = VanillaTransformerModel(self.config)
        self.dropout = nn.Dropout(config.dropout)
        # Without a bias: it would add the same to every choice.
        self.classifier = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, length)`, *optional*): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_choices, length)`, *optional*): 0 hides padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, num_choices, length, hidden_size)`, *optional*):
                Token embeddings, before scaling, in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Right choices, in [0, num_choices).
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels in the whole batch of which this is a part; the summed loss is divided by it.

        Returns:
            [`MultipleChoiceModelOutput`] with `logits` of shape `(batch_size, num_choices)`; recorded states and
            weights have `batch_size * num_choices` as their first dimension.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        num_choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        input_ids, attention_mask, inputs_embeds = (
            None if tensor is None else tensor.flatten(0, 1) for tensor in (input_ids, attention_mask, inputs_embeds)
        )
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        pooled = mean_over_tokens(outputs.last_hidden_state, attention_mask)
        logits = self.classifier(self.dropout(pooled)).view(-1, num_choices)
        loss = None
        if labels is not None:
            loss = token_cross_entropy(logits, labels, num_items_in_batch=num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "VanillaTransformerForConditionalGeneration",
    "VanillaTransformerForMultipleChoice",
    "VanillaTransformerForSequenceClassification",
    "VanillaTransformerModel",
    "VanillaTransformerPreTrainedModel",
]
