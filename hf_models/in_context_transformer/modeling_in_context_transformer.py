"""In-context Transformers over real-valued prompts: dense, and low-rank with exact sparse execution."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_in_context_transformer import InContextTransformerConfig, LowRankInContextTransformerConfig

IGNORED_LABEL = -100
# Learnable gates start at sigmoid(3) = 0.95: open, and with a gradient that can close them.
GATE_LOGIT_START = 3.0

# Which tokens' states are computed: the last one, the key tokens, or every token.
Outputs = Literal["label", "keys", "all"]


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in single precision, or in double precision if it has that already: losses need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def label_losses(logits: torch.Tensor, labels: torch.Tensor, objective: str) -> torch.Tensor:
    """
    The loss of every label by itself.

    Args:
        logits (`torch.FloatTensor` of any shape): Predictions.
        labels (`torch.Tensor` of the same shape): Values; -100 is left out.
        objective (`str`):
            `"squared_error"`, or `"binary_cross_entropy"`: that of `sigmoid(logits)` with 1 where the label is above 0,
            else 0, in nats.

    Returns:
        `torch.FloatTensor` of the same shape, in full precision; 0 where the label is -100.
    """
    labels, logits = labels.to(logits.device), full_precision(logits)
    if objective == "binary_cross_entropy":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, (labels > 0).to(logits.dtype), reduction="none")
    else:
        losses = (logits - labels.to(logits.dtype)).square()
    return losses.masked_fill(labels == IGNORED_LABEL, 0.0)


def divide_by_items(total: torch.Tensor, num_items_in_batch: torch.Tensor | int | None, num_items: torch.Tensor | int):
    """`total` over the number of items of the whole batch if that is given, else over those here (at least 1)."""
    if num_items_in_batch is None:
        num_items_in_batch = torch.as_tensor(num_items, device=total.device).clamp(min=1)
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
    gates: torch.Tensor | None = None,
    **kwargs,
):
    """
    Scaled dot-product attention, step by step. A query that may attend to nothing gets zero attention.

    Args:
        query, key, value (`torch.FloatTensor` of shape `(batch_size, num_heads, length, head_dim)`): Q, K and V.
        attention_mask (`torch.BoolTensor` that broadcasts to `(batch_size, num_heads, query_length, key_length)`,
            *optional*): `True` where the query may attend to the key.
        scaling (`float`): 1 / sqrt(head_dim).
        dropout (`float`, *optional*, defaults to 0.0): Dropout probability of the weights.
        gates (`torch.FloatTensor` of shape `(query_length, key_length)`, *optional*):
            What the weights are multiplied with after the softmax.

    Returns:
        The output of shape `(batch_size, query_length, num_heads, head_dim)` and the weights before dropout, of shape
        `(batch_size, num_heads, query_length, key_length)`, whose rows sum to 1, or to 0 without a key, before gates.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, 0.0)
    if gates is not None:
        weights = weights * gates.to(weights.dtype)
    dropped_weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped_weights, value).transpose(1, 2).contiguous(), weights


class InContextTransformerAttention(nn.Module):
    """
    Multi-head self-attention with a bias in every map.

    Args:
        config ([`InContextTransformerConfig`] or [`LowRankInContextTransformerConfig`]): The model's configuration.
        is_causal (`bool`, *optional*, defaults to `False`): Whether later positions are hidden.
    """

    def __init__(self, config: InContextTransformerConfig | LowRankInContextTransformerConfig, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gates: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attention between projected states, each of shape `(batch_size, length, hidden_size)`; the result has the same
        form, before the output map, with the weights if the implementation gives any. With gates, of shape
        `(query_length, key_length)`, the weights are computed whatever the implementation.
        """
        if gates is None:
            options = {}
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        else:
            options = {"gates": gates}
            attention_interface = eager_attention_forward
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (query, key, value)
        )
        attention_output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **options,
        )
        return attention_output.flatten(-2), weights

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention_output, weights = self.attend(
            self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states), attention_mask
        )
        return self.out_proj(attention_output), weights


class InContextTransformerFeedForward(nn.Module):
    """Position-wise feed-forward network: `W2 act(W1 x + b1) + b2`."""

    def __init__(self, config: InContextTransformerConfig | LowRankInContextTransformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class InContextTransformerBlock(GradientCheckpointingLayer):
    """One GPT-2 block: causal attention, then the feed-forward network, each behind a LayerNorm of its input."""

    def __init__(self, config: InContextTransformerConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = InContextTransformerAttention(config, is_causal=True)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = InContextTransformerFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = hidden_states + self.dropout(self.attn(self.ln_1(hidden_states), attention_mask)[0])
        return hidden_states + self.dropout(self.feed_forward(self.ln_2(hidden_states)))


class ReadMap(nn.Linear):
    """The linear map from coordinates to the residual stream, or from there to predictions."""


class InContextTransformerPreTrainedModel(PreTrainedModel):
    """What all classes of the dense In-context Transformer share: loading, saving and initialisation."""

    config: InContextTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InContextTransformerBlock"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    # Written into every saved config.json, so that each Auto class finds its model whichever class was saved.
    auto_map = {
        "AutoConfig": "configuration_in_context_transformer.InContextTransformerConfig",
        "AutoModel": "modeling_in_context_transformer.InContextTransformerModel",
        "AutoModelForTimeSeriesPrediction": "modeling_in_context_transformer.InContextTransformerForPrediction",
    }

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Two prompts of a size that the model takes, always the same."""
        generator, config = torch.Generator().manual_seed(0), self.config
        points = torch.randn(2, 4, config.n_dims, generator=generator)
        shape = (2, 4) if config.n_outputs == 1 else (2, 4, config.n_outputs)
        values = torch.randn(shape, generator=generator)
        return {"input_values": points.to(self.device), "context_values": values.to(self.device)}

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in the library; the saved config names every class of the model, not only the one that is saved."""
        self.config.auto_map = dict(self.auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Gates):
            init.constant_(module.logits, GATE_LOGIT_START)
        if isinstance(module, ReadMap):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, LowRankPositions):
            module.initialize(std)
        elif self.config.scale_residual_init:
            std = std * (2 * self.config.num_hidden_layers) ** -0.5
            if isinstance(module, InContextTransformerAttention):
                init.normal_(module.out_proj.weight, std=std)
            elif isinstance(module, InContextTransformerFeedForward):
                init.normal_(module.fc2.weight, std=std)


class InContextTransformerModel(InContextTransformerPreTrainedModel):
    r"""
    The dense In-context Transformer without a head (Garg et al. 2022, arXiv:2208.01066, section 2): GPT-2 blocks over
    the prompt `x_1, y_1, x_2, y_2, ...`. An x is read in as it is, a y as a vector whose first coordinates are y and
    whose others are 0.

    Args:
        config ([`InContextTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.in_context_transformer import InContextTransformerConfig, InContextTransformerModel

    >>> config = InContextTransformerConfig(n_dims=5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = InContextTransformerModel(config)
    >>> points, values = torch.randn(3, 11, 5), torch.randn(3, 11)
    >>> model(input_values=points, context_values=values).last_hidden_state.shape
    torch.Size([3, 22, 16])
    ```
    """

    _can_record_outputs = {
        "hidden_states": InContextTransformerBlock,
        "attentions": InContextTransformerAttention,
    }

    def __init__(self, config: InContextTransformerConfig):
        super().__init__(config)
        self.read_in = ReadMap(config.n_dims, config.hidden_size)
        self.embed_positions = nn.Embedding(2 * config.max_points, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([InContextTransformerBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.read_in

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_values: torch.FloatTensor,
        context_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, num_points, n_dims)`): The x of every pair.
            context_values (`torch.FloatTensor` of shape `(batch_size, num_points)` or
                `(batch_size, num_points, n_outputs)`):
                The y of every pair. The last one may be left out (`num_points - 1`), as nothing follows it.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_points)`, *optional*):
                1 for real points, 0 for padding on either side.

        Returns:
            [`BaseModelOutput`] with `last_hidden_state` of shape `(batch_size, length, hidden_size)`, where `length`
            is `2 * num_points`, or one less without the last y: point i stands at `2 * i`, its y behind it.

        Raises:
            ValueError: a shape does not fit; the message names the argument, its shape and the rule.
        """
        tokens = self.interleave(input_values, context_values)
        if attention_mask is not None and attention_mask.shape != input_values.shape[:2]:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must be (batch_size, num_points) = "
                f"{tuple(input_values.shape[:2])}"
            )
        num_points, length = input_values.shape[1], tokens.shape[1]
        points = torch.arange(num_points, device=tokens.device).unsqueeze(0)
        if attention_mask is not None:
            attention_mask = attention_mask.to(tokens.device).bool()
            # Padding on either side never moves a point.
            points = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
            attention_mask = attention_mask.repeat_interleave(2, dim=1)[:, :length]
        position_ids = torch.stack((2 * points, 2 * points + 1), dim=-1).flatten(1)[:, :length]
        hidden_states = self.dropout(self.read_in(tokens.to(self.dtype)) + self.embed_positions(position_ids))
        attention_mask = self.causal_mask(attention_mask, length, tokens.device)
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask)
        return BaseModelOutput(last_hidden_state=self.ln_f(hidden_states))

    def interleave(self, input_values: torch.Tensor, context_values: torch.Tensor) -> torch.Tensor:
        """The prompt as tokens of shape `(batch_size, length, n_dims)`; checks the shapes."""
        n_dims, n_outputs, max_points = self.config.n_dims, self.config.n_outputs, self.config.max_points
        if input_values.ndim != 3 or input_values.shape[-1] != n_dims:
            raise ValueError(
                f"input_values of shape {tuple(input_values.shape)} must be (batch_size, num_points, n_dims), where "
                f"n_dims={n_dims}"
            )
        batch_size, num_points = input_values.shape[:2]
        if not 1 <= num_points <= max_points:
            raise ValueError(f"input_values hold {num_points} points; there must be 1 to max_points={max_points}")
        values = context_values.unsqueeze(-1) if context_values.ndim == 2 else context_values
        fits = values.ndim == 3 and values.shape[0] == batch_size and values.shape[2] == n_outputs
        if not (fits and num_points - 1 <= values.shape[1] <= num_points):
            raise ValueError(
                f"context_values of shape {tuple(context_values.shape)} must be (batch_size, num_points, n_outputs), "
                f"with or without the last point, where batch_size={batch_size}, num_points={num_points} and "
                f"n_outputs={n_outputs}"
            )
        missing = num_points - values.shape[1]
        values = nn.functional.pad(values.to(input_values), (0, n_dims - n_outputs, 0, missing))
        tokens = torch.stack((input_values, values), dim=2).flatten(1, 2)
        return tokens[:, : 2 * num_points - missing]

    def causal_mask(self, attention_mask: torch.Tensor | None, length: int, device) -> torch.Tensor | None:
        """Which token may attend to which, with `True` for yes; `None` where the kernel knows by itself."""
        if attention_mask is None and self.config._attn_implementation == "sdpa":
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if attention_mask is None:
            return causal[None, None]
        # Padding sees itself, so that no kernel meets a query without keys.
        itself = torch.eye(length, dtype=torch.bool, device=device)
        return (causal & attention_mask[:, None, None]) | itself


class InContextTransformerForPrediction(InContextTransformerPreTrainedModel):
    r"""
    The dense In-context Transformer that predicts every y from the pairs before it and its own x: a linear read-out at
    every x.

    Args:
        config ([`InContextTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.in_context_transformer import InContextTransformerConfig, InContextTransformerForPrediction

    >>> config = InContextTransformerConfig(n_dims=5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = InContextTransformerForPrediction(config)
    >>> points, values = torch.randn(3, 11, 5), torch.randn(3, 11)
    >>> outputs = model(input_values=points, context_values=values, labels=values)
    >>> outputs.logits.shape, outputs.loss.shape
    (torch.Size([3, 11, 1]), torch.Size([]))
    ```
    """

    def __init__(self, config: InContextTransformerConfig):
        super().__init__(config)
        self.model = InContextTransformerModel(config)
        self.read_out = ReadMap(config.hidden_size, config.n_outputs)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor,
        context_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.FloatTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Arguments are those of [`InContextTransformerModel`], and:

        Args:
            labels (`torch.FloatTensor` of shape `(batch_size, num_points)` or `(batch_size, num_points, n_outputs)`,
                *optional*):
                Target of every prediction, usually `context_values`; -100 is left out.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labels in the whole batch of which this is a part; the summed loss is divided by it.

        Returns:
            [`TokenClassifierOutput`] with `logits` of shape `(batch_size, num_points, n_outputs)` and, with labels, the
            `loss`: `config.objective` summed over the real labels and divided by `num_items_in_batch`, or by their
            number here.

        Raises:
            ValueError: a shape does not fit.
        """
        outputs = self.model(input_values, context_values, attention_mask=attention_mask, **kwargs)
        logits = self.read_out(outputs.last_hidden_state[:, ::2])
        loss = None
        if labels is not None:
            if labels.numel() != logits.numel() or labels.shape[:2] != logits.shape[:2]:
                raise ValueError(f"labels of shape {tuple(labels.shape)} must be {tuple(logits.shape)}, as the logits")
            labels = labels.view_as(logits)
            total = label_losses(logits, labels, self.config.objective).sum()
            loss = divide_by_items(total, num_items_in_batch, (labels != IGNORED_LABEL).sum())
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def make_attention_masks(
    num_blocks: int, block_size: int, num_tail_tokens: int, device=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The masks that the low-rank model's sparse execution stands for.

    Returns:
        Two `torch.BoolTensor` of shape `(N, N)`, for the local and the later layers: `True` where the token of a row
        attends to that of a column. A row may be empty.
    """
    length = num_blocks * block_size + num_tail_tokens
    place = torch.arange(length, device=device)
    in_tail = place >= num_blocks * block_size
    # Every tail token is a group by itself.
    group = torch.where(in_tail, length + place, place // block_size)
    is_key = in_tail | (place % block_size == block_size - 1)
    return group[:, None] == group[None], is_key[:, None] & is_key[None]


class LowRankPositions(nn.Module):
    """
    Learned positions of low rank: `block_size` rows that all blocks share, and one row for each tail token. With
    `config.position_rank`, these rows are themselves a product of two matrices of that rank.
    """

    def __init__(self, config: LowRankInContextTransformerConfig):
        super().__init__()
        self.block_size = config.block_size
        num_rows, rank = config.block_size + config.num_tail_tokens, config.position_rank
        if rank is None:
            self.rows = nn.Parameter(torch.empty(num_rows, config.hidden_size))
            self.directions = None
        else:
            self.rows = nn.Parameter(torch.empty(num_rows, rank))
            self.directions = nn.Parameter(torch.empty(rank, config.hidden_size))

    def initialize(self, std: float) -> None:
        """Draws normal values, such that positions have standard deviation `std` whatever their rank."""
        if self.directions is None:
            init.normal_(self.rows, std=std)
        else:
            init.normal_(self.rows, std=std)
            init.normal_(self.directions, std=self.rows.shape[-1] ** -0.5)

    def forward(self, num_blocks: int) -> torch.Tensor:
        """Positions of a whole prompt, of shape `(N, hidden_size)`."""
        rows = self.rows if self.directions is None else self.rows @ self.directions
        return torch.cat((rows[: self.block_size].repeat(num_blocks, 1), rows[self.block_size :]))


class Gates(nn.Module):
    """
    Learned gates in (0, 1) of classes of edges.

    Args:
        num_classes (`int`): Number of classes.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(num_classes))

    def forward(self) -> torch.Tensor:
        return self.logits.sigmoid()


class LowRankInContextTransformerLocalAttention(InContextTransformerAttention):
    """Attention of a local layer: within each block, both ways, and of each tail token to itself."""

    def __init__(self, config: LowRankInContextTransformerConfig):
        super().__init__(config)
        self.block_size = config.block_size
        self.num_tail_tokens = config.num_tail_tokens
        self.gates = Gates(config.block_size**2 + config.num_tail_tokens) if config.learnable_masks else None

    def split_gates(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gates within a block, of shape `(block_size, block_size)`, and of the tail tokens, `(num_tail_tokens,)`."""
        if self.gates is None:
            return None, None
        within, tail = self.gates().tensor_split([self.block_size**2])
        return within.view(self.block_size, self.block_size), tail

    def select(self, hidden_states: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """Of the states of all tokens, those that `outputs` asks for: all, or the key tokens."""
        if outputs == "all":
            return hidden_states
        blocks, tail = self.split(hidden_states)
        return torch.cat((blocks[:, :, -1], tail), dim=1)

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch_size, N, width)` to blocks `(batch_size, num_blocks, block_size, width)` and the tail."""
        blocks, tail = states.tensor_split([states.shape[1] - self.num_tail_tokens], dim=1)
        return blocks.unflatten(1, (-1, self.block_size)), tail

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, outputs: Outputs = "all"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, N, hidden_size)`): States of all tokens.
            attention_mask: Not needed: a block that is padding sees itself, and no other block sees it here.
            outputs (`str`, *optional*, defaults to `"all"`): Tokens that attend: `"all"`, or `"keys"`.

        Returns:
            The attention's output at these tokens and, with `"all"` and weights, these of shape
            `(batch_size, num_heads, N, N)`.
        """
        blocks, _ = self.split(hidden_states)
        batch_size, num_blocks = blocks.shape[:2]
        values, tail_values = self.split(self.v_proj(hidden_states))
        queries = self.q_proj(blocks if outputs == "all" else blocks[:, :, -1:])
        gates, tail_gates = self.split_gates()
        attention_output, weights = self.attend(
            *(states.flatten(0, 1) for states in (queries, self.k_proj(blocks), values)),
            gates=gates if outputs == "all" or gates is None else gates[-1:],
        )
        attention_output = attention_output.unflatten(0, (batch_size, num_blocks)).flatten(1, 2)
        # One key has weight 1, which dropout may still take away from a head.
        if self.training and self.attention_dropout > 0:
            ones = tail_values.new_ones(*tail_values.shape[:2], self.config.num_attention_heads, 1)
            kept = nn.functional.dropout(ones, self.attention_dropout)
            tail_values = (tail_values.unflatten(-1, (-1, self.head_dim)) * kept).flatten(-2)
        if tail_gates is not None:
            tail_values = tail_values * tail_gates.to(tail_values.dtype)[:, None]
        attention_output = self.out_proj(torch.cat((attention_output, tail_values), dim=1))
        if weights is not None and outputs == "all":
            weights = self.spread(weights.unflatten(0, (batch_size, num_blocks)), tail_gates)
        return attention_output, weights

    def spread(self, weights: torch.Tensor, tail_gates: torch.Tensor | None) -> torch.Tensor:
        """Weights within the blocks, on the diagonal of a map of all tokens to all tokens."""
        batch_size, num_blocks, num_heads = weights.shape[:3]
        length = num_blocks * self.block_size + self.num_tail_tokens
        spread = weights.new_zeros(batch_size, num_heads, length, length)
        places = torch.arange(num_blocks * self.block_size, device=weights.device).view(num_blocks, -1)
        spread[:, :, places[:, :, None], places[:, None]] = weights.transpose(1, 2)
        tail = 1.0 if tail_gates is None else tail_gates.to(weights.dtype)
        spread.diagonal(dim1=-2, dim2=-1)[..., num_blocks * self.block_size :] = tail
        return spread


class LowRankInContextTransformerKeyAttention(InContextTransformerAttention):
    """Attention of a later layer: among the key tokens, both ways. Other tokens have zero attention."""

    def __init__(self, config: LowRankInContextTransformerConfig):
        super().__init__(config)
        self.block_size = config.block_size
        self.num_tail_tokens = config.num_tail_tokens
        self.gates = Gates((1 + config.num_tail_tokens) ** 2) if config.learnable_masks else None

    def gates_of(self, num_key_tokens: int, outputs: Outputs) -> torch.Tensor | None:
        """Gates from the key tokens that `outputs` asks for to all K, of shape `(1 or K, K)`."""
        if self.gates is None:
            return None
        kinds = 1 + self.num_tail_tokens
        place = torch.arange(num_key_tokens, device=self.gates.logits.device)
        # The blocks' key tokens are of kind 0, those of the tail of kinds 1, 2, ...
        kind = (place - (num_key_tokens - kinds)).clamp(min=0)
        queries = kind[-1:] if outputs == "label" else kind
        return self.gates().view(kinds, kinds)[queries[:, None], kind]

    def select(self, hidden_states: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """Of the states that come in, those that `outputs` asks for: the last one, or as many as there are."""
        return hidden_states[:, -1:] if outputs == "label" else hidden_states

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, outputs: Outputs = "all"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`):
                States of the K key tokens, or of all N tokens with `outputs="all"`.
            attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, 1, K)`, *optional*): `False` hides a key token.
            outputs (`str`, *optional*, defaults to `"all"`):
                Tokens that attend: `"label"`, which is the last one, `"keys"` or `"all"`.

        Returns:
            The attention's output at these tokens and, with `"all"` and weights, these of shape
            `(batch_size, num_heads, N, N)`.
        """
        if outputs != "all":
            queries = self.q_proj(self.select(hidden_states, outputs))
            keys, values = self.k_proj(hidden_states), self.v_proj(hidden_states)
            gates = self.gates_of(hidden_states.shape[1], outputs)
            attention_output, weights = self.attend(queries, keys, values, attention_mask, gates)
            return self.out_proj(attention_output), weights

        length = hidden_states.shape[1]
        place = key_places(length, self.block_size, self.num_tail_tokens, hidden_states.device)
        key_states = hidden_states[:, place]
        key_output, weights = self.attend(
            self.q_proj(key_states),
            self.k_proj(key_states),
            self.v_proj(key_states),
            attention_mask,
            self.gates_of(len(place), outputs),
        )
        attention_output = torch.zeros_like(hidden_states, dtype=key_output.dtype).index_copy(1, place, key_output)
        if weights is not None:
            spread = weights.new_zeros(*weights.shape[:2], length, length)
            spread[:, :, place[:, None], place] = weights
            weights = spread
        return self.out_proj(attention_output), weights


def key_places(length: int, block_size: int, num_tail_tokens: int, device=None) -> torch.Tensor:
    """Places of the key tokens in a prompt of `length` tokens: the last of each block, and the tail."""
    tail_start = length - num_tail_tokens
    return torch.cat(
        (
            torch.arange(block_size - 1, tail_start, block_size, device=device),
            torch.arange(tail_start, length, device=device),
        )
    )


class LowRankInContextTransformerBlock(GradientCheckpointingLayer):
    """One layer: attention of its kind, then the feed-forward network, each behind a LayerNorm of its input."""

    def __init__(self, config: LowRankInContextTransformerConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        is_local = layer_idx < config.num_local_layers
        self.attn = (
            LowRankInContextTransformerLocalAttention if is_local else LowRankInContextTransformerKeyAttention
        )(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = InContextTransformerFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, outputs: Outputs
    ) -> torch.Tensor:
        attention_output, _ = self.attn(self.ln_1(hidden_states), attention_mask, outputs)
        hidden_states = self.attn.select(hidden_states, outputs) + self.dropout(attention_output)
        return hidden_states + self.dropout(self.feed_forward(self.ln_2(hidden_states)))


class LowRankInContextTransformerPreTrainedModel(InContextTransformerPreTrainedModel):
    """What all classes of the low-rank In-context Transformer share."""

    config: LowRankInContextTransformerConfig
    _no_split_modules = ["LowRankInContextTransformerBlock"]

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Two prompts of four blocks, always the same."""
        length = 4 * self.config.block_size + self.config.num_tail_tokens
        tokens = torch.randn(2, length, self.config.n_dims, generator=torch.Generator().manual_seed(0))
        return {"input_values": tokens.to(self.device)}

    auto_map = {
        "AutoConfig": "configuration_in_context_transformer.LowRankInContextTransformerConfig",
        "AutoModel": "modeling_in_context_transformer.LowRankInContextTransformerModel",
        "AutoModelForSequenceClassification": (
            "modeling_in_context_transformer.LowRankInContextTransformerForSequenceClassification"
        ),
    }


class LowRankInContextTransformerModel(LowRankInContextTransformerPreTrainedModel):
    r"""
    The low-rank In-context Transformer without a head; [`LowRankInContextTransformerConfig`] says who sees whom. What
    is not asked for is not computed, and no score is computed only to be masked; the outputs and gradients are those
    of the dense model with [`make_attention_masks`], where a token that sees nothing has zero attention.

    The number of blocks is that of the prompt. The order of the blocks carries no information.

    Args:
        config ([`LowRankInContextTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.in_context_transformer import LowRankInContextTransformerConfig, LowRankInContextTransformerModel

    >>> config = LowRankInContextTransformerConfig(
    ...     n_dims=5, block_size=4, hidden_size=16, num_hidden_layers=4, num_attention_heads=2
    ... )
    >>> model = LowRankInContextTransformerModel(config)
    >>> prompts_of_two_and_of_nine_blocks = torch.randn(3, 2 * 4 + 3, 5), torch.randn(3, 9 * 4 + 3, 5)
    >>> [tuple(model(prompts).last_hidden_state.shape) for prompts in prompts_of_two_and_of_nine_blocks]
    [(3, 5, 16), (3, 12, 16)]
    ```
    """

    _can_record_outputs = {
        "hidden_states": LowRankInContextTransformerBlock,
        "attentions": InContextTransformerAttention,
    }

    def __init__(self, config: LowRankInContextTransformerConfig):
        super().__init__(config)
        self.read_in = ReadMap(config.n_dims, config.hidden_size)
        self.positions = LowRankPositions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            [LowRankInContextTransformerBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.read_in

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        outputs: Outputs = "keys",
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, N, n_dims)`):
                Tokens: the blocks one after another, then the tail. `N = V * block_size + num_tail_tokens` for any
                number V of blocks.
            attention_mask (`torch.Tensor` of shape `(batch_size, V)`, *optional*):
                1 for real blocks, 0 for blocks that are padding, which may stand anywhere.
            outputs (`str`, *optional*, defaults to `"keys"`):
                `"label"`: the last token; `"keys"`: the last token of every block, and the tail; `"all"`: every token.

        Returns:
            [`BaseModelOutput`] with `last_hidden_state` of shape `(batch_size, length, hidden_size)`, where `length` is
            1, `K = V + num_tail_tokens` or N. With `output_hidden_states=True` and `output_attentions=True` (the
            latter under `attn_implementation="eager"`) all tokens are computed: states of shape
            `(batch_size, N, hidden_size)` before the first layer and after every one, and weights of shape
            `(batch_size, num_heads, N, N)`.

        Raises:
            ValueError: a shape does not fit, or `outputs` is none of the three.
        """
        if outputs not in ("label", "keys", "all"):
            raise ValueError(f"outputs={outputs!r} must be 'label', 'keys' or 'all'")
        num_blocks = self.count_blocks(input_values, attention_mask)
        is_recording = any(
            kwargs.get(flag) or getattr(self.config, flag, False)
            for flag in ("output_hidden_states", "output_attentions")
        )
        computed = "all" if is_recording else outputs

        place = key_places(
            input_values.shape[1], self.config.block_size, self.config.num_tail_tokens, input_values.device
        )
        positions = self.positions(num_blocks)
        num_local_layers = self.config.num_local_layers
        if num_local_layers == 0 and computed != "all":
            input_values, positions = input_values[:, place], positions[place]
        hidden_states = self.dropout(self.read_in(input_values.to(self.dtype)) + positions)
        attention_mask = self.key_mask(attention_mask, input_values.device)
        for layer_idx, block in enumerate(self.blocks):
            if computed == "all" or layer_idx < num_local_layers - 1:
                needed = "all"
            elif layer_idx < len(self.blocks) - 1:
                needed = "keys"
            else:
                needed = outputs
            hidden_states = block(hidden_states, attention_mask, needed)

        if is_recording and outputs == "label":
            hidden_states = hidden_states[:, -1:]
        elif is_recording and outputs == "keys":
            hidden_states = hidden_states[:, place]
        return BaseModelOutput(last_hidden_state=self.ln_f(hidden_states))

    def count_blocks(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> int:
        """Number of blocks in the prompts; raises `ValueError` where a shape does not fit."""
        config, shape = self.config, tuple(input_values.shape)
        if input_values.ndim != 3 or shape[-1] != config.n_dims:
            raise ValueError(
                f"input_values of shape {shape} must be (batch_size, length, n_dims), where n_dims={config.n_dims}"
            )
        num_blocks, rest = divmod(shape[1] - config.num_tail_tokens, config.block_size)
        if num_blocks < 1 or rest != 0:
            raise ValueError(
                f"input_values of shape {shape} have length {shape[1]}; it must be V * block_size + num_tail_tokens "
                f"for a number V of blocks, where block_size={config.block_size} and "
                f"num_tail_tokens={config.num_tail_tokens}"
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (shape[0], num_blocks):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must be (batch_size, num_blocks) = "
                f"{(shape[0], num_blocks)}"
            )
        return num_blocks

    def key_mask(self, attention_mask: torch.Tensor | None, device) -> torch.Tensor | None:
        """The blocks' mask as one over the key tokens: `torch.BoolTensor` of shape `(batch_size, 1, 1, K)`."""
        if attention_mask is None:
            return None
        mask = nn.functional.pad(attention_mask.to(device).bool(), (0, self.config.num_tail_tokens), value=True)
        return mask[:, None, None]


@dataclass
class LowRankInContextTransformerOutput(ModelOutput):
    """
    Output of [`LowRankInContextTransformerForSequenceClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, given with `labels`):
            `label_loss`, and with `block_targets` `label_loss + config.block_loss_weight * block_loss`; with learnable
            masks plus `config.gate_cost_weight * gate_loss`.
        logits (`torch.FloatTensor` of shape `(batch_size, 1)`): Log odds that the label is 1.
        token_logits (`torch.FloatTensor` of shape `(batch_size, K)` or `(batch_size, N)`, *optional*):
            The same number read at each key token or at every token; with `outputs` other than `"label"`, or with
            block targets.
        label_loss (`torch.FloatTensor` of shape `()`, *optional*, given with `labels`): Cross entropy in nats.
        block_loss (`torch.FloatTensor` of shape `()`, *optional*, given with `block_targets`): The same.
        gate_loss (`torch.FloatTensor` of shape `()`, *optional*, given with `labels` and learnable masks):
            Mean gate of all layers, times this part's share of the whole batch.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, on request): See [`LowRankInContextTransformerModel`].
        attentions (`tuple(torch.FloatTensor)`, *optional*, on request): See [`LowRankInContextTransformerModel`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    token_logits: torch.FloatTensor | None = None
    label_loss: torch.FloatTensor | None = None
    block_loss: torch.FloatTensor | None = None
    gate_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LowRankInContextTransformerForSequenceClassification(LowRankInContextTransformerPreTrainedModel):
    r"""
    The low-rank In-context Transformer that answers a question with two outcomes: a linear read-out at the last token.

    Args:
        config ([`LowRankInContextTransformerConfig`]): The model's configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.in_context_transformer import (
    ...     LowRankInContextTransformerConfig,
    ...     LowRankInContextTransformerForSequenceClassification,
    ... )

    >>> config = LowRankInContextTransformerConfig(
    ...     n_dims=5, block_size=4, hidden_size=16, num_hidden_layers=4, num_attention_heads=2
    ... )
    >>> model = LowRankInContextTransformerForSequenceClassification(config)
    >>> outputs = model(input_values=torch.randn(2, 6 * 4 + 3, 5), labels=torch.tensor([1, 0]))
    >>> outputs.logits.shape, outputs.loss.shape
    (torch.Size([2, 1]), torch.Size([]))
    ```
    """

    def __init__(self, config: LowRankInContextTransformerConfig):
        super().__init__(config)
        self.model = LowRankInContextTransformerModel(config)
        self.read_out = ReadMap(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        block_targets: torch.Tensor | None = None,
        outputs: Outputs = "label",
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LowRankInContextTransformerOutput:
        """
        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, N, n_dims)`): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, V)`, *optional*): 0 for blocks that are padding.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                The answers: 1, or 0 or -1; -100 is left out.
            block_targets (`torch.Tensor` of shape `(batch_size, V)`, *optional*):
                One more label for every block, of the same values, for the number read at the block's last token.
                Needs no further weight.
            outputs (`str`, *optional*, defaults to `"label"`):
                `"keys"` or `"all"` also give `token_logits`. Block targets need at least `"keys"`, and get it.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of labelled prompts in the whole batch of which this is a part; the summed losses are divided by
                it.

        Returns:
            [`LowRankInContextTransformerOutput`]. `label_loss` is the binary cross entropy of the labels, and
            `block_loss` that of the block targets, averaged within a prompt; both are sums over prompts divided
            by `num_items_in_batch`, or by the number of labelled prompts here.

        Raises:
            ValueError: a shape does not fit, or `outputs` is none of the three.
        """
        if block_targets is not None and outputs == "label":
            outputs = "keys"
        body_outputs = self.model(input_values, attention_mask=attention_mask, outputs=outputs, **kwargs)
        token_logits = self.read_out(body_outputs.last_hidden_state).squeeze(-1)
        logits = token_logits[:, -1:]
        loss = label_loss = block_loss = gate_loss = None
        num_items = logits.shape[0]
        if labels is not None:
            if labels.numel() != logits.shape[0]:
                raise ValueError(f"labels of shape {tuple(labels.shape)} must be (batch_size,) = {(logits.shape[0],)}")
            labels = labels.view_as(logits)
            num_items = (labels != IGNORED_LABEL).sum()
            total = label_losses(logits, labels, "binary_cross_entropy").sum()
            loss = label_loss = divide_by_items(total, num_items_in_batch, num_items)
        if block_targets is not None:
            block_logits = self.block_logits(token_logits, outputs)
            if block_targets.shape != block_logits.shape:
                raise ValueError(
                    f"block_targets of shape {tuple(block_targets.shape)} must be (batch_size, num_blocks) = "
                    f"{tuple(block_logits.shape)}"
                )
            counts = (block_targets != IGNORED_LABEL).sum(dim=1).clamp(min=1).to(block_logits.device)
            means = label_losses(block_logits, block_targets, "binary_cross_entropy").sum(dim=1) / counts
            block_loss = divide_by_items(means.sum(), num_items_in_batch, num_items)
            if loss is not None:
                loss = loss + self.config.block_loss_weight * block_loss
        if loss is not None and self.config.learnable_masks:
            gates = torch.cat([module() for module in self.modules() if isinstance(module, Gates)])
            gate_loss = divide_by_items(full_precision(gates).mean() * num_items, num_items_in_batch, num_items)
            loss = loss + self.config.gate_cost_weight * gate_loss
        return LowRankInContextTransformerOutput(
            loss=loss,
            logits=logits,
            token_logits=None if outputs == "label" else token_logits,
            label_loss=label_loss,
            block_loss=block_loss,
            gate_loss=gate_loss,
            hidden_states=body_outputs.hidden_states,
            attentions=body_outputs.attentions,
        )

    def block_logits(self, token_logits: torch.Tensor, outputs: Outputs) -> torch.Tensor:
        """The numbers read at the last token of every block, of shape `(batch_size, V)`."""
        token_logits = token_logits[:, : -self.config.num_tail_tokens]
        return (
            token_logits if outputs == "keys" else token_logits[:, self.config.block_size - 1 :: self.config.block_size]
        )


__all__ = [
    "InContextTransformerForPrediction",
    "InContextTransformerModel",
    "InContextTransformerPreTrainedModel",
    "LowRankInContextTransformerForSequenceClassification",
    "LowRankInContextTransformerModel",
    "LowRankInContextTransformerOutput",
    "LowRankInContextTransformerPreTrainedModel",
]
