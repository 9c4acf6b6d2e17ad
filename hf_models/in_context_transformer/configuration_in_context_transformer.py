"""Configurations of the dense and the low-rank In-context Transformer."""

import difflib
from dataclasses import fields
from typing import Literal

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.type_validators import positive_int_field, probability

logger = logging.get_logger(__name__)

# Keywords that are not fields and that the library itself writes into config.json or passes while loading.
LIBRARY_KEYWORDS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tokenizer_class",
    "torch_dtype",
}


# The library's `interval` lets everything pass from below when its lower end is 0, up to transformers 5.17 at least.
@as_validated_field
def positive_number(value: float | int):
    if not value > 0:
        raise ValueError(f"Value must be greater than 0, got {value}")


@as_validated_field
def non_negative_number(value: float | int):
    if not value >= 0:
        raise ValueError(f"Value must be at least 0, got {value}")


def warn_of_unknown(config: PreTrainedConfig, keywords: dict) -> None:
    """Warns once of each keyword that is no field of the configuration, with the nearest field's name."""
    known = [field.name for field in fields(config)]
    for name in sorted(keywords.keys() - LIBRARY_KEYWORDS):
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
        logger.warning_once(f"{type(config).__name__} has no field `{name}`, the model will not use it{hint}")


def check_heads(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless the heads share out the width."""
    if config.hidden_size % config.num_attention_heads != 0:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads={config.num_attention_heads}"
        )


def check_finite(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a number that is not finite, or that no tensor can hold."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, float | int) and not abs(value) < 2**63:
            raise ValueError(f"{entry.name}={value} must be a finite number, below 2**63 in size")


@strict
class InContextTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`InContextTransformerModel`] and its head: the decoder-only model of "What Can Transformers Learn
    In-Context? A Case Study of Simple Function Classes" (Garg et al. 2022, arXiv:2208.01066). The defaults are the
    paper's standard model.

    Args:
        n_dims (`int`, *optional*, defaults to 20):
            Number of coordinates of an input x (d in the paper).
        n_outputs (`int`, *optional*, defaults to 1):
            Number of coordinates of a value y; at most `n_dims`, since x and y pass through the same read-in map.
        max_points (`int`, *optional*, defaults to 101):
            Largest number of pairs (x, y) in a prompt; there are two learned positions for each.
        hidden_size (`int`, *optional*, defaults to 256):
            Width of the residual stream. A multiple of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of heads of every attention; each head has `hidden_size / num_attention_heads` dimensions.
        intermediate_size (`int`, *optional*):
            Width between the two linear maps of the feed-forward network. `None` means `4 * hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            `"gelu_pytorch_tanh"`, which is GPT-2's activation in one kernel, `"gelu"` or `"relu"`.
        objective (`str`, *optional*, defaults to `"squared_error"`):
            Loss of [`InContextTransformerForPrediction`]: `"squared_error"`, or `"binary_cross_entropy"` for values
            that are signs.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of every sublayer's output and of the sum of read-in and positions.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Term added to the variance in every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that the blocks' matrices and the positions are drawn from.
            The matrices of read-in and read-out are uniform within `1 / sqrt(number of inputs)`, as in the original.
        scale_residual_init (`bool`, *optional*, defaults to `True`):
            Whether the maps that write into the residual stream start smaller by `sqrt(2 * num_hidden_layers)`, as in
            GPT-2.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or lies outside its range, or fields
            contradict each other; the message names the fields, their values and the rule.

    Example:

    ```python
    >>> from hf_models.in_context_transformer import InContextTransformerConfig

    >>> config = InContextTransformerConfig(n_dims=5, hidden_size=64, num_hidden_layers=3, num_attention_heads=2)
    >>> config.intermediate_size
    256
    ```
    """

    model_type = "in_context_transformer"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    # The library's default names modules of other models.
    base_model_fsdp_plan = None

    n_dims: int = positive_int_field(default=20)
    n_outputs: int = positive_int_field(default=1)
    max_points: int = positive_int_field(default=101)
    hidden_size: int = positive_int_field(default=256)
    num_hidden_layers: int = positive_int_field(default=12)
    num_attention_heads: int = positive_int_field(default=8)
    intermediate_size: int | None = positive_int_field(default=None)
    hidden_act: Literal["gelu_pytorch_tanh", "gelu", "relu"] = "gelu_pytorch_tanh"
    objective: Literal["squared_error", "binary_cross_entropy"] = "squared_error"
    dropout: float | int = probability(default=0.0)
    attention_dropout: float | int = probability(default=0.0)
    layer_norm_eps: float | int = positive_number(default=1e-5)
    initializer_range: float | int = positive_number(default=0.02)
    scale_residual_init: bool = True

    def __post_init__(self, **kwargs):
        warn_of_unknown(self, kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the rules that involve several fields; runs after construction and before saving."""
        check_finite(self)
        check_heads(self)
        if self.n_outputs > self.n_dims:
            raise ValueError(f"n_outputs={self.n_outputs} must be at most n_dims={self.n_dims}")


@strict
class LowRankInContextTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`LowRankInContextTransformerModel`] and its head: an in-context Transformer for prompts that are
    made of equal blocks, such as tables with their columns. It shares one block of positions among all blocks, and
    each layer has a mask of its own kind:

    * A prompt has N = `num_blocks * block_size + num_tail_tokens` tokens. Its *key tokens* are the last token of every
      block and the tail.
    * In the first `num_local_layers` layers a token sees its own block, both ways; a tail token sees itself.
    * In the later layers the key tokens see each other, both ways; all others see nothing.

    No weight depends on the number of blocks, so that a model runs at any.

    Args:
        n_dims (`int`, *optional*, defaults to 20):
            Number of coordinates of a token.
        num_blocks (`int`, *optional*, defaults to 20):
            Number of blocks that the model is made for (V). Prompts may have any other number.
        block_size (`int`, *optional*, defaults to 4):
            Tokens in a block: a table's name and its C columns are C + 1.
        num_tail_tokens (`int`, *optional*, defaults to 3):
            Tokens behind the blocks: a separator and the two columns asked for. The label is read at the last one.
        num_local_layers (`int`, *optional*, defaults to 2):
            Number of layers in which a token sees its own block; less than `num_hidden_layers`.
        position_rank (`int`, *optional*):
            Rank r of the learned positions: `block_size + num_tail_tokens` rows as a product of a matrix with r columns
            and one with r rows. `None` means one free row for each.
        block_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the loss over `block_targets` beside that over `labels`.
        learnable_masks (`bool`, *optional*, defaults to `False`):
            Whether every layer learns a gate in (0, 1) for each class of allowed edges, which multiplies their weights
            after the softmax. In a local layer a class is a pair of places in a block, or one tail token with itself;
            in a later layer a pair of kinds of key tokens, where all blocks are of one kind and each tail token is one
            of its own. Such layers compute their scores one by one, whatever the attention implementation.
        gate_cost_weight (`float`, *optional*, defaults to 0.0):
            Weight of the mean gate in the loss: what an open gate costs. Needs `learnable_masks`.
        hidden_size (`int`, *optional*, defaults to 256):
            Width of the residual stream. A multiple of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of blocks of attention and feed-forward network.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of heads of every attention; each head has `hidden_size / num_attention_heads` dimensions.
        intermediate_size (`int`, *optional*):
            Width between the two linear maps of the feed-forward network. `None` means `4 * hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu_pytorch_tanh"`):
            `"gelu_pytorch_tanh"`, which is GPT-2's activation in one kernel, `"gelu"` or `"relu"`.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of every sublayer's output and of the sum of read-in and positions.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Term added to the variance in every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that the matrices of the layers and the positions are drawn
            from. Those of read-in and read-out are uniform within `1 / sqrt(number of inputs)`.
        scale_residual_init (`bool`, *optional*, defaults to `False`):
            Whether the maps that write into the residual stream start smaller by `sqrt(2 * num_hidden_layers)`.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or lies outside its range, or fields
            contradict each other; the message names the fields, their values and the rule.

    Example:

    ```python
    >>> from hf_models.in_context_transformer import LowRankInContextTransformerConfig

    >>> config = LowRankInContextTransformerConfig(num_blocks=20, block_size=4)
    >>> config.sequence_length, config.num_key_tokens
    (83, 23)
    ```
    """

    model_type = "low_rank_in_context_transformer"
    keys_to_ignore_at_inference = [
        "token_logits",
        "label_loss",
        "block_loss",
        "gate_loss",
        "hidden_states",
        "attentions",
    ]
    # The library's default names modules of other models.
    base_model_fsdp_plan = None

    n_dims: int = positive_int_field(default=20)
    num_blocks: int = positive_int_field(default=20)
    block_size: int = positive_int_field(default=4)
    num_tail_tokens: int = positive_int_field(default=3)
    num_local_layers: int = 2
    position_rank: int | None = positive_int_field(default=None)
    block_loss_weight: float | int = non_negative_number(default=1.0)
    learnable_masks: bool = False
    gate_cost_weight: float | int = non_negative_number(default=0.0)
    hidden_size: int = positive_int_field(default=256)
    num_hidden_layers: int = positive_int_field(default=12)
    num_attention_heads: int = positive_int_field(default=8)
    intermediate_size: int | None = positive_int_field(default=None)
    hidden_act: Literal["gelu_pytorch_tanh", "gelu", "relu"] = "gelu_pytorch_tanh"
    dropout: float | int = probability(default=0.0)
    attention_dropout: float | int = probability(default=0.0)
    layer_norm_eps: float | int = positive_number(default=1e-5)
    initializer_range: float | int = positive_number(default=0.02)
    scale_residual_init: bool = False

    def __post_init__(self, **kwargs):
        warn_of_unknown(self, kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the rules that involve several fields; runs after construction and before saving."""
        check_finite(self)
        check_heads(self)
        if not 0 <= self.num_local_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_local_layers={self.num_local_layers} must lie in [0, num_hidden_layers), where "
                f"num_hidden_layers={self.num_hidden_layers}: the last layer reads from all blocks"
            )
        if self.gate_cost_weight > 0 and not self.learnable_masks:
            raise ValueError(f"gate_cost_weight={self.gate_cost_weight} needs learnable_masks=True")

    @property
    def sequence_length(self) -> int:
        """Tokens of a prompt with `num_blocks` blocks (N)."""
        return self.num_blocks * self.block_size + self.num_tail_tokens

    @property
    def num_key_tokens(self) -> int:
        """Key tokens of a prompt with `num_blocks` blocks (K)."""
        return self.num_blocks + self.num_tail_tokens


__all__ = ["InContextTransformerConfig", "LowRankInContextTransformerConfig"]
