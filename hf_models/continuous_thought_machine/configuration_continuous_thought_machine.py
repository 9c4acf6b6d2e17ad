"""Configurations of the Continuous Thought Machine and of its variant with dynamic weights."""

import difflib
import math
import re
from dataclasses import field, fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.type_validators import interval, positive_int_field, probability

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

# Layer type, layers per stage and channels after each stage of the standard ResNets.
RESNETS = {
    "resnet18": ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
    "resnet34": ("basic", [3, 4, 6, 3], [64, 128, 256, 512]),
    "resnet50": ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
    "resnet101": ("bottleneck", [3, 4, 23, 3], [256, 512, 1024, 2048]),
    "resnet152": ("bottleneck", [3, 8, 36, 3], [256, 512, 1024, 2048]),
}
SHALLOW_WIDE_CHANNELS = 2048
# The library writes a name for each class; a number of them that was a slip would take all memory.
MOST_NAMED_CLASSES = 2**20

# The argument of `forward` that each kind of backbone reads; all others read `pixel_values`.
INPUT_NAMES = {"parity_backbone": "input_values", "none": "input_features"}

POSITIONAL_EMBEDDINGS_OF_IMAGES = ("none", "learnable-fourier", "multi-learnable-fourier", "custom-rotational")


def number_of_pairs(neuron_select_type: str, n_synch: int) -> int:
    """Size of the synchronisation of `n_synch` selected neurons (S): one number per pair of neurons."""
    return n_synch if neuron_select_type == "random-pairing" else n_synch * (n_synch + 1) // 2


def check_finite(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a number that is not finite, or that no tensor can hold."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, float | int) and not abs(value) < 2**63:
            raise ValueError(f"{entry.name}={value} must be a finite number, below 2**63 in size")


@strict
class ContinuousThoughtMachineConfig(PreTrainedConfig):
    r"""
    Configuration of [`ContinuousThoughtMachineModel`] and its heads: neurons with private models of their own history
    which think for a number of internal ticks, look at the input by attention, and answer from the synchronisation of
    pairs of neurons (Darlow et al., "Continuous Thought Machines", arXiv 2505.05522). Field names and choices are the
    publication's; the defaults are its CIFAR-10 setting.

    Symbols: T ticks, D neurons, E width of the attended input, M memory length, H hidden width of a neuron's model.

    Args:
        iterations (`int`, *optional*, defaults to 50):
            Internal ticks in training, and at most so many at inference unless a call says otherwise (T).
        d_model (`int`, *optional*, defaults to 256):
            Number of neurons (D). `hidden_size` is an alias.
        d_input (`int`, *optional*, defaults to 64):
            Width of keys, values and attention output (E). A multiple of `heads`.
        heads (`int`, *optional*, defaults to 16):
            Attention heads. `num_attention_heads` is an alias.
        n_synch_out (`int`, *optional*, defaults to 256):
            Neurons selected on each side of the synchronisation that predictions are read from.
        n_synch_action (`int`, *optional*, defaults to 512):
            Neurons selected on each side of the synchronisation that attention queries are made from.
        synapse_depth (`int`, *optional*, defaults to 5):
            Depth of the synapse model: 1 is a single gated layer, more a U-Net of that many widths.
        memory_length (`int`, *optional*, defaults to 15):
            Pre-activations that a neuron's model sees (M).
        deep_nlms (`bool`, *optional*, defaults to `True`):
            Whether a neuron's model has a hidden layer.
        memory_hidden_dims (`int`, *optional*, defaults to 64):
            Hidden width of a deep neuron-level model (H).
        do_layernorm_nlm (`bool`, *optional*, defaults to `False`):
            Whether neuron-level models normalise their inputs.
        backbone_type (`str`, *optional*, defaults to `"resnet18-1"`):
            What turns the input into features. `"resnetXX-k"` with XX in 18, 34, 50, 101, 152 and k in 1..4: the first
            k stages of a ResNet with a 3×3 stem, over `pixel_values`. `"shallow-wide"`: two wide gated convolutions
            over `pixel_values`. `"parity_backbone"`: an embedding of the signs of `input_values`. `"none"`:
            `input_features` as they are.
        positional_embedding_type (`str`, *optional*, defaults to `"none"`):
            Code added to the features. `"learnable-fourier"`, `"multi-learnable-fourier"` and `"custom-rotational"`
            (square maps only) for image backbones, `"custom-rotational-1d"` for the parity backbone, `"none"` for any.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of `pixel_values`, or of `input_features`. Without a meaning for the parity backbone.
        image_size (`int` or `list[int]`, *optional*):
            Height and width that `pixel_values` must have, in pixels. `None`: any.
        out_dims (`int`, *optional*):
            Logits per tick. `None`: as many as `prediction_reshaper` says, with `num_labels` for its -1.
        prediction_reshaper (`list[int]`, *optional*, defaults to `[-1]`):
            Shape of one sample's prediction: classes last, output positions before. One entry may be -1.
        neuron_select_type (`str`, *optional*, defaults to `"random-pairing"`):
            Which pairs of neurons synchronise. `"random-pairing"`: n random pairs. `"first-last"`: all pairs among the
            first neurons for the output, among the last for the action. `"random"`: pairs (i, j ≥ i) of two random
            lists.
        n_random_pairing_self (`int`, *optional*, defaults to 0):
            With `"random-pairing"`: how many of the pairs join a neuron with itself.
        pairing_seed (`int`, *optional*, defaults to 0):
            Seed of the random pairs. They are also stored with the weights.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability in the synapse model and on attention weights.
        dropout_nlm (`float`, *optional*):
            Dropout probability on the inputs of neuron-level models. `None` means `dropout`.
        certainty_threshold (`float`, *optional*):
            At inference a sample stops thinking after the first tick whose certainty is at least this, in [0, 1].
            `None`: every sample thinks for all ticks.
        certainty_check_interval (`int`, *optional*, defaults to 5):
            Ticks between two looks at the certainties. It changes the cost, never the result: a sample that passed the
            threshold in between is cut there.
        answer_tick (`str`, *optional*, defaults to `"most_certain"`):
            The tick that a head's answer is read at, the `"most_certain"` or the `"last"`. The loss is the mean of that
            of this tick and that of the tick with the smallest loss.
        curriculum_lookahead (`int`, *optional*):
            If given, training follows the publication's curriculum for routes: a sample's loss covers the longest
            prefix that any tick gets right and this many positions more. `None`: all positions.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or lies outside its range, or fields
            contradict each other; the message names the fields, their values and the rule.

    Example:

    ```python
    >>> from hf_models.continuous_thought_machine import ContinuousThoughtMachineConfig

    >>> config = ContinuousThoughtMachineConfig(out_dims=50, prediction_reshaper=[10, 5])
    >>> config.num_labels
    5
    ```
    """

    model_type = "continuous_thought_machine"
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "heads"}
    keys_to_ignore_at_inference = [
        "predictions",
        "certainties",
        "synchronisation",
        "ticks",
        "best_tick",
        "certain_tick",
        "best_tick_loss",
        "certain_tick_loss",
        "hidden_states",
        "attentions",
        "pre_activations",
        "synchronisation_action",
        "synchronisation_out",
        "contexts",
    ]

    iterations: int = positive_int_field(default=50)
    d_model: int = positive_int_field(default=256)
    d_input: int = positive_int_field(default=64)
    heads: int = positive_int_field(default=16)
    n_synch_out: int = positive_int_field(default=256)
    n_synch_action: int = positive_int_field(default=512)
    synapse_depth: int = positive_int_field(default=5)
    memory_length: int = positive_int_field(default=15)
    deep_nlms: bool = True
    memory_hidden_dims: int = positive_int_field(default=64)
    do_layernorm_nlm: bool = False
    backbone_type: str = "resnet18-1"
    positional_embedding_type: Literal[
        "none", "learnable-fourier", "multi-learnable-fourier", "custom-rotational", "custom-rotational-1d"
    ] = "none"
    num_channels: int = positive_int_field(default=3)
    image_size: int | list[int] | None = None
    out_dims: int | None = positive_int_field(default=None)
    prediction_reshaper: list[int] = field(default_factory=lambda: [-1])
    neuron_select_type: Literal["random-pairing", "first-last", "random"] = "random-pairing"
    n_random_pairing_self: int = interval(min=0)(default=0)
    pairing_seed: int = 0
    dropout: float | int = probability(default=0.0)
    dropout_nlm: float | int | None = None
    certainty_threshold: float | int | None = None
    certainty_check_interval: int = positive_int_field(default=5)
    answer_tick: Literal["most_certain", "last"] = "most_certain"
    curriculum_lookahead: int | None = positive_int_field(default=None)

    def __post_init__(self, **kwargs):
        known = [*(field.name for field in fields(self)), *self.attribute_map]
        for name in kwargs.keys() - LIBRARY_KEYWORDS - self.attribute_map.keys():
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
            logger.warning_once(f"{type(self).__name__} has no field `{name}`, the model will not use it{hint}")
        labels_given = "num_labels" in kwargs or self.id2label is not None
        super().__post_init__(**kwargs)
        shape = self.prediction_reshaper
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            return
        if self.out_dims is None and shape.count(-1) <= 1 and all(size > 0 or size == -1 for size in shape):
            self.out_dims = math.prod(self.num_labels if size == -1 else size for size in shape)
        # The labels follow from the shape of a prediction where they are not named.
        if not labels_given and isinstance(self.out_dims, int) and self.out_dims > 0 and self.num_labels:
            classes = self.prediction_shape[-1] if self.prediction_shape else 0
            if 0 < classes <= MOST_NAMED_CLASSES and classes != self.num_labels:
                self.num_labels = classes

    @property
    def prediction_shape(self) -> list[int]:
        """`prediction_reshaper` without -1; empty if it does not fit `out_dims`."""
        shape = list(self.prediction_reshaper)
        if -1 in shape:
            shape[shape.index(-1)] = self.out_dims // math.prod([size for size in shape if size > 0])
        return shape if math.prod(shape) == self.out_dims and min(shape, default=0) > 0 else []

    @property
    def input_name(self) -> str:
        """The argument of `forward` that holds the input."""
        return INPUT_NAMES.get(self.backbone_type, "pixel_values")

    @property
    def d_backbone(self) -> int:
        """Channels of the features."""
        if self.backbone_type == "parity_backbone":
            return self.d_input
        if self.backbone_type == "shallow-wide":
            return SHALLOW_WIDE_CHANNELS
        if self.backbone_type == "none":
            return self.num_channels
        name, stages = self.backbone_type.split("-")
        return RESNETS[name][2][int(stages) - 1]

    @property
    def synch_size_out(self) -> int:
        """Pairs of the output synchronisation (S_o)."""
        return number_of_pairs(self.neuron_select_type, self.n_synch_out)

    @property
    def synch_size_action(self) -> int:
        """Pairs of the action synchronisation (S_a)."""
        return number_of_pairs(self.neuron_select_type, self.n_synch_action)

    def validate_architecture(self):
        """Checks the rules that involve several fields; runs after construction and before saving."""
        check_finite(self)
        # The alias of a field reaches it without the field's own check.
        for name in ("d_model", "heads"):
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"{name}={value!r} must be a positive int")
        if self.d_input % self.heads != 0:
            raise ValueError(f"d_input={self.d_input} must be a multiple of heads={self.heads}")
        self._check_selection()
        self._check_input()
        self._check_prediction()
        for name in ("dropout_nlm", "certainty_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]")

    def _check_selection(self):
        selected = f"n_synch_out={self.n_synch_out} and n_synch_action={self.n_synch_action}"
        if self.neuron_select_type == "first-last" and self.n_synch_out + self.n_synch_action > self.d_model:
            raise ValueError(
                f"{selected} must together be at most d_model={self.d_model} with neuron_select_type='first-last'"
            )
        if self.neuron_select_type != "random-pairing":
            if self.n_random_pairing_self:
                raise ValueError(
                    f"n_random_pairing_self={self.n_random_pairing_self} has a meaning only with "
                    f"neuron_select_type='random-pairing', not {self.neuron_select_type!r}"
                )
        elif self.n_random_pairing_self >= min(self.n_synch_out, self.n_synch_action):
            raise ValueError(f"{selected} must exceed n_random_pairing_self={self.n_random_pairing_self}")

    def _check_input(self):
        resnet = re.fullmatch(r"(resnet\d+)-[1-4]", self.backbone_type)
        if self.backbone_type not in ("none", "parity_backbone", "shallow-wide") and (
            resnet is None or resnet[1] not in RESNETS
        ):
            raise ValueError(
                f"backbone_type={self.backbone_type!r} must be 'none', 'parity_backbone', 'shallow-wide' or one of "
                f"{', '.join(RESNETS)} followed by -1, -2, -3 or -4"
            )
        allowed = POSITIONAL_EMBEDDINGS_OF_IMAGES
        if self.backbone_type in INPUT_NAMES:
            allowed = ("none", "custom-rotational-1d") if self.backbone_type == "parity_backbone" else ("none",)
        if self.positional_embedding_type not in allowed:
            raise ValueError(
                f"positional_embedding_type={self.positional_embedding_type!r} must be one of "
                f"{', '.join(map(repr, allowed))} with backbone_type={self.backbone_type!r}"
            )
        sizes = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        if self.image_size is not None and (
            len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes)
        ):
            raise ValueError(f"image_size={self.image_size!r} must be one positive int, or two: height and width")

    def _check_prediction(self):
        shape = self.prediction_reshaper
        if not shape or shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
            raise ValueError(f"prediction_reshaper={shape} must hold positive sizes, one of which may be -1")
        if not self.prediction_shape:
            raise ValueError(f"prediction_reshaper={shape} must hold out_dims={self.out_dims} values")
        if self.prediction_shape[-1] < 2:
            raise ValueError(
                f"prediction_reshaper={shape} with out_dims={self.out_dims} must end in at least 2 classes: one class "
                "is always certain"
            )
        if self.prediction_shape[-1] != self.num_labels:
            raise ValueError(
                f"out_dims={self.out_dims} in the shape prediction_reshaper={shape} makes {self.prediction_shape[-1]} "
                f"classes, but num_labels={self.num_labels}"
            )


@strict
class HyperContinuousThoughtMachineConfig(ContinuousThoughtMachineConfig):
    r"""
    Configuration of [`HyperContinuousThoughtMachineModel`] and its heads: a Continuous Thought Machine whose synapse
    layers, and optionally neuron-level models, get low-rank weights from a small context of the current tick.

    Args as in [`ContinuousThoughtMachineConfig`], and:
        hyper_layers (`str`, *optional*, defaults to `"all"`):
            Layers of the synapse U-Net with dynamic weights: `"none"`, the two innermost levels on both sides
            (`"bottleneck"`), the way `"down"`, the way `"up"`, or both (`"all"`). The first projection has none.
        hyper_rank (`int`, *optional*, defaults to 8):
            Rank of a layer's dynamic weights (r).
        hyper_context_size (`int`, *optional*, defaults to 8):
            Length of the context (c).
        hyper_nlms (`bool`, *optional*, defaults to `False`):
            Whether the layers of the neuron-level models have dynamic weights: one pair of low-rank factors for all
            neurons, scaled by a number per neuron.
        hyper_nlm_rank (`int`, *optional*, defaults to 4):
            Rank of the neuron-level models' dynamic weights.
    """

    model_type = "hyper_continuous_thought_machine"

    hyper_layers: Literal["none", "bottleneck", "down", "up", "all"] = "all"
    hyper_rank: int = positive_int_field(default=8)
    hyper_context_size: int = positive_int_field(default=8)
    hyper_nlms: bool = False
    hyper_nlm_rank: int = positive_int_field(default=4)

    def validate_hyper_layers(self):
        """Checks that there are layers to be dynamic."""
        if self.hyper_layers != "none" and self.synapse_depth == 1:
            raise ValueError(
                f"hyper_layers={self.hyper_layers!r} needs a U-Net synapse, but synapse_depth={self.synapse_depth}"
            )


__all__ = ["ContinuousThoughtMachineConfig", "HyperContinuousThoughtMachineConfig"]
