"""What the Continuous Thought Machine is compared with: an LSTM that thinks in ticks, and a feed-forward network.

Both see the input through the machine's own encoder, and both are made as wide as gives them the parameters of a
machine with the same settings. They follow the baselines of Darlow et al. (arXiv 2505.05522), with differences that the
classes name. They exist for comparison: import this module before loading one with an Auto class.
"""

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.utils.type_validators import positive_int_field

from hf_models.continuous_thought_machine import (
    ContinuousThoughtMachineConfig,
    ContinuousThoughtMachineForImageClassification,
    ContinuousThoughtMachineForTokenClassification,
    ContinuousThoughtMachinePreTrainedModel,
)
from hf_models.continuous_thought_machine.encoder_continuous_thought_machine import (
    ContinuousThoughtMachineEncoder,
    at_least_float32,
)
from hf_models.continuous_thought_machine.modeling_continuous_thought_machine import (
    ContinuousThoughtMachineAttention,
    ContinuousThoughtMachineModelOutput,
)

MOST_WIDTH = 2**20

Baseline = TypeVar("Baseline", bound="ThoughtLSTMConfig | ThoughtFeedForwardConfig")


@strict
class ThoughtLSTMConfig(ContinuousThoughtMachineConfig):
    """
    Configuration of [`ThoughtLSTMModel`]: that of the machine it is compared with, and

    Args:
        width (`int`, *optional*):
            Hidden width of the LSTM; see [`with_matched_width`].
        num_layers (`int`, *optional*, defaults to 1):
            Layers of the LSTM.
    """

    model_type = "thought_lstm"
    _auto_class = None

    width: int | None = positive_int_field(default=None)
    num_layers: int = positive_int_field(default=1)


@strict
class ThoughtFeedForwardConfig(ContinuousThoughtMachineConfig):
    """
    Configuration of [`ThoughtFeedForwardModel`]: that of the machine it is compared with, and

    Args:
        width (`int`, *optional*):
            Width of the hidden layer; see [`with_matched_width`].
        num_tokens (`int`, *optional*):
            Positions of the encoded input; see [`with_matched_width`].
    """

    model_type = "thought_feed_forward"
    _auto_class = None

    width: int | None = positive_int_field(default=None)
    num_tokens: int | None = positive_int_field(default=None)


class ThoughtBaselineModel(ContinuousThoughtMachinePreTrainedModel):
    """What both baselines share: encoder, initialisation and output."""

    # Neither has more than one way to attend, or ticks to recompute.
    supports_gradient_checkpointing = False

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, ThoughtLSTMModel):
            init.uniform_(module.start_hidden, -(self.config.width**-0.5), self.config.width**-0.5)
            init.uniform_(module.start_cell, -(self.config.width**-0.5), self.config.width**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.projection

    def read(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Key tokens of the one input that is given, of shape `(batch_size, positions, d_input)`."""
        given = {name: value for name, value in inputs.items() if value is not None}
        if list(given) != [self.config.input_name]:
            raise ValueError(
                f"backbone_type={self.config.backbone_type!r} reads {self.config.input_name}, "
                f"got {' and '.join(given) or 'no input'}"
            )
        return self.encoder(given[self.config.input_name])

    def output(self, predictions: torch.Tensor, hidden: torch.Tensor) -> ContinuousThoughtMachineModelOutput:
        """The common output from predictions of shape `(ticks, batch_size, out_dims)` and the last hidden state."""
        logits = predictions.unflatten(-1, (-1, self.config.prediction_shape[-1]))
        log_probabilities = logits.log_softmax(dim=-1, dtype=at_least_float32(logits.dtype))
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean(dim=-1)
        entropy = entropy / math.log(self.config.prediction_shape[-1])
        num_ticks, batch_size, _ = predictions.shape
        return ContinuousThoughtMachineModelOutput(
            predictions=predictions.permute(1, 2, 0),
            certainties=torch.stack((entropy, 1 - entropy)).permute(2, 0, 1),
            synchronisation=hidden,
            ticks=torch.full((batch_size,), num_ticks, device=predictions.device),
        )


class ThoughtLSTMModel(ThoughtBaselineModel):
    """
    An LSTM that thinks in ticks: at each tick it attends to the input with a query from its hidden state, takes a step
    on what it found, and gives a prediction from its new hidden state. As the published baseline; every tick's
    prediction is read by one linear map.

    Args:
        config ([`ThoughtLSTMConfig`]): Configuration.
    """

    config: ThoughtLSTMConfig

    def __init__(self, config: ThoughtLSTMConfig):
        super().__init__(config)
        if config.width is None:
            raise ValueError("width=None must be an int; with_matched_width finds the one that matches the machine")
        self.encoder = ContinuousThoughtMachineEncoder(config)
        self.query = nn.Linear(config.width, config.d_input)
        self.attention = ContinuousThoughtMachineAttention(config)
        self.lstm = nn.LSTM(config.d_input, config.width, config.num_layers, dropout=float(config.dropout))
        self.start_hidden = nn.Parameter(torch.empty(config.num_layers, config.width))
        self.start_cell = nn.Parameter(torch.empty(config.num_layers, config.width))
        self.projection = nn.Linear(config.width, config.out_dims)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        iterations: int | None = None,
        certainty_threshold: float | None = None,
        **kwargs: Any,
    ) -> ContinuousThoughtMachineModelOutput:
        """As that of the machine; `synchronisation` is the last hidden state, and no sample stops early."""
        tokens = self.read(pixel_values=pixel_values, input_values=input_values, input_features=input_features)
        key, value = self.attention.project(tokens)
        hidden = self.start_hidden.unsqueeze(1).expand(-1, len(tokens), -1).contiguous()
        cell = self.start_cell.unsqueeze(1).expand(-1, len(tokens), -1).contiguous()
        states = []
        for _ in range(iterations or self.config.iterations):
            found, _ = self.attention(self.query(hidden[-1]), key, value)
            _, (hidden, cell) = self.lstm(found.unsqueeze(0), (hidden, cell))
            states.append(hidden[-1])
        return self.output(self.projection(torch.stack(states)), states[-1])


class ThoughtFeedForwardModel(ThoughtBaselineModel):
    """
    A network that answers at once: the tokens of all positions side by side, one hidden layer, the prediction. The
    published baseline averages the positions instead, which leaves nothing of a maze or a sequence to read.

    Args:
        config ([`ThoughtFeedForwardConfig`]): Configuration.
    """

    config: ThoughtFeedForwardConfig

    def __init__(self, config: ThoughtFeedForwardConfig):
        super().__init__(config)
        if config.width is None or config.num_tokens is None:
            raise ValueError(
                f"width={config.width} and num_tokens={config.num_tokens} must be ints; with_matched_width finds them"
            )
        self.encoder = ContinuousThoughtMachineEncoder(config)
        self.hidden = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(config.num_tokens * config.d_input, config.width), nn.ReLU()
        )
        self.projection = nn.Linear(config.width, config.out_dims)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        iterations: int | None = None,
        certainty_threshold: float | None = None,
        **kwargs: Any,
    ) -> ContinuousThoughtMachineModelOutput:
        """As that of the machine, with a single tick; `synchronisation` is the hidden layer."""
        tokens = self.read(pixel_values=pixel_values, input_values=input_values, input_features=input_features)
        if tokens.shape[1] != self.config.num_tokens:
            raise ValueError(f"the input makes {tokens.shape[1]} tokens, num_tokens={self.config.num_tokens}")
        hidden = self.hidden(tokens.flatten(1))
        return self.output(self.projection(hidden).unsqueeze(0), hidden)


class ThoughtLSTMForImageClassification(ContinuousThoughtMachineForImageClassification):
    """[`ThoughtLSTMModel`] that names the class of an image."""

    config: ThoughtLSTMConfig
    _auto_class = None
    body_class = ThoughtLSTMModel


class ThoughtLSTMForTokenClassification(ContinuousThoughtMachineForTokenClassification):
    """[`ThoughtLSTMModel`] that gives one class to every position of an answer."""

    config: ThoughtLSTMConfig
    _auto_class = None
    body_class = ThoughtLSTMModel


class ThoughtFeedForwardForImageClassification(ContinuousThoughtMachineForImageClassification):
    """[`ThoughtFeedForwardModel`] that names the class of an image."""

    config: ThoughtFeedForwardConfig
    _auto_class = None
    body_class = ThoughtFeedForwardModel


class ThoughtFeedForwardForTokenClassification(ContinuousThoughtMachineForTokenClassification):
    """[`ThoughtFeedForwardModel`] that gives one class to every position of an answer."""

    config: ThoughtFeedForwardConfig
    _auto_class = None
    body_class = ThoughtFeedForwardModel


HEADS = {"image": AutoModelForImageClassification, "token": AutoModelForTokenClassification}


def num_parameters(config: PreTrainedConfig, head: str) -> int:
    """Parameters of a model that is not built.

    Args:
        config: its configuration.
        head: "image" for one class per sample, "token" for one class per position.
    """
    with torch.device("meta"):
        return HEADS[head].from_config(config).num_parameters()


def machine_config(config: ContinuousThoughtMachineConfig) -> ContinuousThoughtMachineConfig:
    """The configuration of the machine that a baseline's configuration describes beside its own fields."""
    names = inspect.get_annotations(ContinuousThoughtMachineConfig)
    return ContinuousThoughtMachineConfig(**{name: getattr(config, name) for name in names}, id2label=config.id2label)


def with_matched_width(config: Baseline, head: str, example: Mapping[str, torch.Tensor]) -> Baseline:
    """
    A baseline's configuration with the width that brings it nearest to the machine's number of parameters.

    Args:
        config ([`ThoughtLSTMConfig`] or [`ThoughtFeedForwardConfig`]): Configuration; a `width` that it has is kept.
        head (`str`): "image" or "token", as for [`num_parameters`].
        example (`dict`): An input with a batch axis, under its name; only its shape matters.

    Returns:
        A copy of the configuration with `width`, and `num_tokens` where it has that, filled in.

    Raises:
        ValueError: if the narrowest baseline is larger than the machine.
    """
    config = copy.deepcopy(config)
    if isinstance(config, ThoughtFeedForwardConfig):
        with torch.no_grad():
            config.num_tokens = ContinuousThoughtMachineEncoder(config).eval()(example[config.input_name]).shape[1]
    if config.width is not None:
        return config
    wanted = num_parameters(machine_config(config), head)

    def size(width: int) -> int:
        config.width = width
        return num_parameters(config, head)

    if size(1) > wanted:
        raise ValueError(f"width: even 1 makes {size(1):,} parameters, more than the machine's {wanted:,}")
    low, high = 1, 2
    while size(high) < wanted and high < MOST_WIDTH:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    config.width = min((low, high), key=lambda width: abs(size(width) - wanted))
    return config


for _config_class, _image_class, _token_class, _body_class in (
    (
        ThoughtLSTMConfig,
        ThoughtLSTMForImageClassification,
        ThoughtLSTMForTokenClassification,
        ThoughtLSTMModel,
    ),
    (
        ThoughtFeedForwardConfig,
        ThoughtFeedForwardForImageClassification,
        ThoughtFeedForwardForTokenClassification,
        ThoughtFeedForwardModel,
    ),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModel.register(_config_class, _body_class, exist_ok=True)
    AutoModelForImageClassification.register(_config_class, _image_class, exist_ok=True)
    AutoModelForTokenClassification.register(_config_class, _token_class, exist_ok=True)
