"""Configuration of the Vanilla Transformer."""

import difflib
import math
from dataclasses import fields
from typing import Any, Literal

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


# What a matched configuration takes over from the one it is matched to.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_decoder_layers",
    "hidden_act",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "max_position_embeddings",
    "layer_norm_eps",
    "label_smoothing",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "tie_word_embeddings",
    "is_encoder_decoder",
    "num_labels",
)
HEADS_WITHOUT_DECODER = ("SequenceClassification", "MultipleChoice")
MAX_MATCHED_WIDTH = 16384


# The library's `interval` lets everything pass from below when its lower end is 0, up to transformers 5.17 at least.
@as_validated_field
def positive_number(value: float | int):
    if not value > 0:
        raise ValueError(f"Value must be greater than 0, got {value}")


def check_finite(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a number that is not finite, or that no tensor can hold."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, float | int) and not abs(value) < 2**63:
            raise ValueError(f"{entry.name}={value} must be a finite number, below 2**63 in size")


@strict
class VanillaTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`VanillaTransformerModel`] and its heads: the encoder-decoder of "Attention Is All You Need"
    (Vaswani et al. 2017, arXiv:1706.03762). The defaults are the paper's base model (Table 3, row "base"). Pre-norm
    layers, a final LayerNorm and GELU are options that the paper does not have.

    Args:
        vocab_size (`int`, *optional*, defaults to 37000):
            Number of tokens of the one vocabulary that source and target share (section 5.1).
        hidden_size (`int`, *optional*, defaults to 512):
            Width of the residual stream (d_model). A multiple of `num_attention_heads`, and even when
            `position_embedding_type="sinusoidal"`.
        num_hidden_layers (`int`, *optional*, defaults to 6):
            Number of encoder layers (N).
        num_decoder_layers (`int`, *optional*):
            Number of decoder layers. `None` means `num_hidden_layers`, as in the paper.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of heads of every attention (h); each head has `hidden_size / num_attention_heads` dimensions.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Width between the two linear maps of the feed-forward network (d_ff).
        hidden_act (`str`, *optional*, defaults to `"relu"`):
            `"relu"` (equation 2) or `"gelu"`.
        norm_position (`str`, *optional*, defaults to `"post"`):
            `"post"`: `LayerNorm(x + Sublayer(x))`, as in the paper. `"pre"`: `x + Sublayer(LayerNorm(x))`
            (Xiong et al. 2020, arXiv:2002.04745).
        final_layer_norm (`bool`, *optional*):
            Whether each stack ends with one more LayerNorm. `None` means: exactly when `norm_position="pre"`. The paper
            has none, `torch.nn.Transformer` has one.
        position_embedding_type (`str`, *optional*, defaults to `"sinusoidal"`):
            `"sinusoidal"` (section 3.5; no parameters, any length) or `"learned"` (Table 3, row E; one table for each
            stack).
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Number of learned positions, in tokens. Sinusoidal positions have no such limit.
        scale_embedding (`bool`, *optional*, defaults to `True`):
            Whether token embeddings are multiplied by `sqrt(hidden_size)` where they enter a stack (section 3.4).
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout probability of every sublayer's output and of the sum of embeddings and positions (section 5.4).
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights.
        activation_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability after the activation of the feed-forward network.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Term added to the variance in every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that weights are drawn from.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target distribution spread evenly over the vocabulary (section 5.4 uses 0.1).
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the decoder returns its keys and values for the next generation step.
        pad_token_id (`int`, *optional*, defaults to 0):
            Padding token.
        bos_token_id (`int`, *optional*, defaults to 1):
            Token before a sequence.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2):
            Token after a sequence.
        decoder_start_token_id (`int`, *optional*, defaults to 1):
            First token of every decoder input.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether source embedding, target embedding and output projection are one matrix (section 3.4). If `False`,
            each has its own.
        is_encoder_decoder (`bool`, *optional*, defaults to `True`):
            `False` describes the encoder alone, without any decoder parameter: the classification and choice heads save
            their configuration so.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or lies outside its range, or fields
            contradict each other; the message names the fields, their values and the rule.

    Example:

    ```python
    >>> from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerModel

    >>> config = VanillaTransformerConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = VanillaTransformerModel(config)
    >>> config.num_decoder_layers
    2
    ```
    """

    model_type = "vanilla_transformer"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "hidden_states",
        "attentions",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
    ]
    # The library's default names modules of decoder-only models; encoder and decoder state their own plan.
    base_model_fsdp_plan = None

    vocab_size: int = positive_int_field(default=37000)
    hidden_size: int = positive_int_field(default=512)
    num_hidden_layers: int = positive_int_field(default=6)
    num_decoder_layers: int | None = positive_int_field(default=None)
    num_attention_heads: int = positive_int_field(default=8)
    intermediate_size: int = positive_int_field(default=2048)
    hidden_act: Literal["relu", "gelu"] = "relu"
    norm_position: Literal["post", "pre"] = "post"
    final_layer_norm: bool | None = None
    position_embedding_type: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_position_embeddings: int = positive_int_field(default=512)
    scale_embedding: bool = True
    dropout: float | int = probability(default=0.1)
    attention_dropout: float | int = probability(default=0.0)
    activation_dropout: float | int = probability(default=0.0)
    layer_norm_eps: float | int = positive_number(default=1e-5)
    initializer_range: float | int = positive_number(default=0.02)
    label_smoothing: float | int = probability(default=0.0)
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        known = [field.name for field in fields(self)]
        for name in sorted(kwargs.keys() - LIBRARY_KEYWORDS):
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
            logger.warning_once(f"{type(self).__name__} has no field `{name}`, the model will not use it{hint}")
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        if self.final_layer_norm is None:
            self.final_layer_norm = self.norm_position == "pre"
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the rules that involve several fields; runs after construction and before saving."""
        check_finite(self)
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2 != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be even when position_embedding_type='sinusoidal', "
                "because every sine has its cosine"
            )
        eos_token_ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        named_tokens = [
            ("pad_token_id", self.pad_token_id),
            ("bos_token_id", self.bos_token_id),
            ("decoder_start_token_id", self.decoder_start_token_id),
            *(("eos_token_id", token_id) for token_id in eos_token_ids),
        ]
        for name, token_id in named_tokens:
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name}={token_id} must lie in [0, vocab_size), where vocab_size={self.vocab_size}")

    def num_trainable_parameters(self, head: str | None = None) -> int:
        """
        Number of trainable parameters of a model with this configuration, without building it; tied matrices count
        once.

        Args:
            head (`str`, *optional*):
                What follows `VanillaTransformerFor` in the name of the class. `None` means `"ConditionalGeneration"`,
                or with `is_encoder_decoder=False` the encoder alone.

        Raises:
            ValueError: there is no such head.
        """
        per_unit, rest = self._parameters_by_inner_unit(head)
        return per_unit * self.intermediate_size + rest

    def _parameters_by_inner_unit(self, head: str | None) -> tuple[int, int]:
        """Parameters for each unit of `intermediate_size`, and all others."""
        width, decodes = self.hidden_size, head in (None, "ConditionalGeneration") and self.is_encoder_decoder
        assert self.num_decoder_layers is not None  # filled in
        layers, decoder_layers = self.num_hidden_layers, self.num_decoder_layers if decodes else 0
        stacks = 2 if decodes else 1
        rest = self.vocab_size * width * (3 if decodes and not self.tie_word_embeddings else 1)
        rest += layers * (4 * width**2 + 9 * width) + decoder_layers * (8 * width**2 + 15 * width)
        if self.position_embedding_type == "learned":
            rest += stacks * self.max_position_embeddings * width
        if self.final_layer_norm:
            rest += stacks * 2 * width
        if head == "SequenceClassification":
            rest += (width + 1) * len(self.id2label or ())
        elif head == "MultipleChoice":
            rest += width
        elif head not in (None, "ConditionalGeneration"):
            raise ValueError(
                f"head={head!r} must be 'ConditionalGeneration', 'SequenceClassification' or 'MultipleChoice'"
            )
        return (layers + decoder_layers) * (2 * width + 1), rest

    @classmethod
    def matched_to(
        cls,
        reference: "PreTrainedConfig | int",
        *,
        head: str | None = None,
        tolerance: float = 0.01,
        **fixed,
    ) -> "VanillaTransformerConfig":
        """
        The Transformer to compare another model with: as many trainable parameters, and proportions as usual.

        With the width of the other model, if some number of encoder layers then gives feed-forward networks of 2 to 8
        times the width; else with the width, a multiple of the size of a head, that comes nearest to the usual
        proportions (feed-forward networks of 4 times the width, a width of 64 for each encoder layer, as in GPT-2 small
        and BERT base). `intermediate_size` is what makes the numbers meet. Equal parameters are not equal work: what a
        layer costs grows with the length of the sequence, what slots cost does not.

        Args:
            reference ([`~transformers.PreTrainedConfig`] or `int`):
                A configuration with a method `num_trainable_parameters(head)`, from which vocabulary, positions,
                special tokens, decoder layers, activation and dropout are taken over as far as it has them; or a
                number of parameters.
            head (`str`, *optional*):
                The head whose parameters are matched, of both models; see [`num_trainable_parameters`].
            tolerance (`float`, *optional*, defaults to 0.01):
                Largest difference, relative to the reference.
            fixed:
                Fields that keep the given values. Unless they say otherwise, layers are pre-norm and positions learned.

        Raises:
            TypeError: the reference is neither a number nor a configuration that can count its parameters.
            ValueError: no sizes meet the number within the tolerance.
        """
        shared: dict[str, Any] = {}
        if isinstance(reference, int):
            wanted = reference
        elif hasattr(reference, "num_trainable_parameters"):
            wanted = reference.num_trainable_parameters(head)
            shared = {name: getattr(reference, name) for name in SHARED_FIELDS if hasattr(reference, name)}
            target_size = getattr(reference, "decoder_vocab_size", None)
            if target_size not in (None, reference.vocab_size):
                raise ValueError(
                    f"source and target share one vocabulary here, but the reference has vocab_size="
                    f"{reference.vocab_size} and decoder_vocab_size={target_size}"
                )
        else:
            raise TypeError(f"a {type(reference).__name__} does not tell its num_trainable_parameters")
        if head not in (None, "ConditionalGeneration", *HEADS_WITHOUT_DECODER):
            # A model without a decoder that answers in its own way: here only the encoder-decoder gives text.
            head, shared["is_encoder_decoder"] = "ConditionalGeneration", True
            shared.pop("num_decoder_layers", None)
        settings = {"norm_position": "pre", "position_embedding_type": "learned"} | shared | fixed
        # One configuration whose sizes change: what is counted needs no more, and building each takes long.
        trial = cls(**settings)
        own_width = settings.get("hidden_size", cls.hidden_size)
        head_size = own_width // settings.get("num_attention_heads", cls.num_attention_heads)
        unit = 64 if own_width > 64 else max(1, head_size)

        layer_numbers = [fixed["num_hidden_layers"]] if "num_hidden_layers" in fixed else range(1, 25)
        best: tuple[float, dict] | None = None
        for width in [own_width] if "hidden_size" in fixed else [own_width, *range(unit, MAX_MATCHED_WIDTH, unit)]:
            heads = settings.get("num_attention_heads", cls.num_attention_heads)
            if width != own_width and "num_attention_heads" not in fixed:
                heads = width // unit
            if width % heads != 0:
                continue
            for layers in layer_numbers:
                sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
                if settings.get("num_decoder_layers") is None:
                    sizes["num_decoder_layers"] = layers
                for name, value in sizes.items():
                    setattr(trial, name, value)
                per_unit, rest = trial._parameters_by_inner_unit(head)
                if layers == layer_numbers[0]:
                    fewest = rest
                exact = (wanted - rest) / per_unit
                # Multiples of 8 where they are fine enough.
                choices = [8 * round(exact / 8), round(exact)]
                if "intermediate_size" in fixed:
                    choices = [fixed["intermediate_size"]]
                fitting = [inner for inner in choices if abs(inner - exact) * per_unit <= tolerance * wanted]
                if not fitting or fitting[0] < 1:
                    continue
                inner, ratio = fitting[0], fitting[0] / width
                score = abs(math.log(ratio / 4))
                if width == own_width and 2 <= ratio <= 8:
                    # Before all solutions of other widths.
                    score -= 1000
                else:
                    score += abs(math.log(width / 64 / layers))
                if best is None or score < best[0]:
                    best = (score, sizes | {"intermediate_size": inner})
            if best is not None and best[0] < 0:
                break
            if width > own_width and fewest > wanted:
                break
        if best is None:
            given = f" with {', '.join(f'{name}={value!r}' for name, value in fixed.items())}" if fixed else ""
            raise ValueError(f"no sizes{given} come within {tolerance:.2%} of {wanted:,} trainable parameters")
        return cls(**settings | best[1])

    def get_text_config(self, decoder=None, encoder=None):
        """
        As in the library, with one addition: the decoder's view has the decoder's number of layers, because the
        library sizes the caches of `generate` by `num_hidden_layers`.
        """
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and not encoder and self.is_encoder_decoder:
            config.num_hidden_layers = self.num_decoder_layers
        return config


__all__ = ["VanillaTransformerConfig"]
