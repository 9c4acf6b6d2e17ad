"""What a Continuous Thought Machine looks at: backbones, codes of positions, and the projection to key tokens."""

import math

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetEncoder

from .configuration_continuous_thought_machine import RESNETS, SHALLOW_WIDE_CHANNELS, ContinuousThoughtMachineConfig

STEM_CHANNELS = 64


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class ContinuousThoughtMachineResNetBackbone(nn.Module):
    """
    First stages of a ResNet behind a 1×1 convolution to three channels and a 3×3 stem of stride 1 with pooling.

    The stages are the library's own, so that those of a pretrained ResNet fit: see `load_stages`.
    """

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        name, stages = config.backbone_type.split("-")
        layer_type, depths, channels = RESNETS[name]
        self.initial_rgb = nn.Conv2d(config.num_channels, 3, kernel_size=1)
        self.stem = ResNetConvLayer(3, STEM_CHANNELS, kernel_size=3, stride=1)
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        resnet_config = ResNetConfig(
            embedding_size=STEM_CHANNELS,
            hidden_sizes=channels[: int(stages)],
            depths=depths[: int(stages)],
            layer_type=layer_type,
        )
        self.encoder = ResNetEncoder(resnet_config)

    def load_stages(self, resnet: PreTrainedModel) -> None:
        """
        Takes the stages' weights from a ResNet of the library, such as `ResNetModel.from_pretrained(…)`. Its stem is
        left aside: it is 7×7 with stride 2.

        Args:
            resnet (`ResNetModel` or a head of it): The source, of the same layer type and at least as deep.

        Raises:
            ValueError: the source is no ResNet, or its stages differ from these in depth or width.
        """
        source = getattr(resnet, "resnet", resnet)
        own = self.encoder.state_dict()
        given = source.encoder.state_dict() if hasattr(source, "encoder") else {}
        differing = [name for name, value in own.items() if name not in given or given[name].shape != value.shape]
        if differing:
            raise ValueError(
                f"{type(resnet).__name__} does not fit the backbone: encoder.{differing[0]} is not the same"
            )
        self.encoder.load_state_dict({name: given[name] for name in own})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of shape `(batch_size, channels, height, width)`."""
        return self.encoder(self.pooler(self.stem(self.initial_rgb(pixel_values)))).last_hidden_state


class ContinuousThoughtMachineShallowWideBackbone(nn.Module):
    """Two wide gated convolutions, the second in 32 groups, each with batch normalisation."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        width = SHALLOW_WIDE_CHANNELS
        self.layers = nn.Sequential(
            nn.Conv2d(config.num_channels, 2 * width, kernel_size=3, stride=2, padding=1),
            nn.GLU(dim=1),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1, groups=32),
            nn.GLU(dim=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of shape `(batch_size, 2048, height, width)`."""
        return self.layers(pixel_values)


class ContinuousThoughtMachineParityBackbone(nn.Module):
    """Embeds each number of a sequence by whether it is 1."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        self.embedding = nn.Embedding(2, config.d_input)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """Features of shape `(batch_size, d_input, length)`."""
        return self.embedding((input_values == 1).long()).transpose(1, 2)


def build_backbone(config: ContinuousThoughtMachineConfig) -> nn.Module:
    if config.backbone_type == "none":
        return nn.Identity()
    if config.backbone_type == "parity_backbone":
        return ContinuousThoughtMachineParityBackbone(config)
    if config.backbone_type == "shallow-wide":
        return ContinuousThoughtMachineShallowWideBackbone(config)
    return ContinuousThoughtMachineResNetBackbone(config)


def rotations(start: torch.Tensor, number: int) -> torch.Tensor:
    """A vector of length 2 turned by `number` angles from 0 to π: shape `(number, 2)`."""
    angles = torch.linspace(0, math.pi, number, device=start.device, dtype=at_least_float32(start.dtype))
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack((cosines * start[0] - sines * start[1], sines * start[0] + cosines * start[1]), dim=-1).to(
        start.dtype
    )


class ContinuousThoughtMachineRotationalEmbedding1D(nn.Module):
    """Code of a position in a sequence: a linear map of the vector (0, 1) turned by up to π."""

    def __init__(self, channels: int):
        super().__init__()
        self.projection = nn.Linear(2, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Code of shape `(channels, length)` for features of shape `(batch_size, channels, length)`."""
        weight = self.projection.weight
        start = torch.tensor((0.0, 1.0), device=weight.device, dtype=weight.dtype)
        return self.projection(rotations(start, features.shape[-1])).T


class ContinuousThoughtMachineRotationalEmbedding(nn.Module):
    """Code of a cell of a square map: a linear map of a learned vector turned by the row's and the column's angle."""

    def __init__(self, channels: int):
        super().__init__()
        self.start_vector = nn.Parameter(torch.empty(2))
        self.projection = nn.Linear(4, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Code of shape `(channels, size, size)` for features of shape `(batch_size, channels, size, size)`."""
        height, width = features.shape[-2:]
        if height != width:
            raise ValueError(
                f"positional_embedding_type='custom-rotational' needs square features, the image makes {height}x{width}"
            )
        turned = rotations(self.start_vector, width)
        rows, columns = turned.unsqueeze(1).expand(-1, width, -1), turned.unsqueeze(0).expand(width, -1, -1)
        return self.projection(torch.cat((rows, columns), dim=-1)).permute(2, 0, 1)


class ContinuousThoughtMachineFourierEmbedding(nn.Module):
    """
    Code of a cell of a map from learned Fourier features of its coordinates in [0, 1] (arXiv 2106.02795).

    Args:
        channels (`int`): Width of the code.
        scale (`float`): The frequencies start as normal with standard deviation `scale ** -2`.
    """

    num_features = 256
    hidden_size = 128

    def __init__(self, channels: int, scale: float = 0.4):
        super().__init__()
        self.scale = scale
        self.frequencies = nn.Parameter(torch.empty(self.num_features // 2, 2))
        self.mlp = nn.Sequential(
            nn.Linear(self.num_features, self.hidden_size),
            nn.GLU(),
            nn.Linear(self.hidden_size // 2, channels),
            nn.LayerNorm(channels),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Code of shape `(channels, height, width)` for features of shape `(batch_size, channels, height, width)`."""
        options = {"device": self.frequencies.device, "dtype": self.frequencies.dtype}
        y, x = (torch.linspace(0, 1, size, **options) for size in features.shape[-2:])
        coordinates = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        angles = coordinates @ self.frequencies.T
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1) / math.sqrt(self.num_features)
        return self.mlp(waves).permute(2, 0, 1)


class ContinuousThoughtMachineMultiFourierEmbedding(nn.Module):
    """Ten [`ContinuousThoughtMachineFourierEmbedding`] of different scales, in a learned mixture."""

    num_scales = 10

    def __init__(self, channels: int):
        super().__init__()
        scales = np.linspace(1.0, 0.1, self.num_scales).tolist()
        self.embedders = nn.ModuleList(ContinuousThoughtMachineFourierEmbedding(channels, scale) for scale in scales)
        self.combination = nn.Parameter(torch.empty(self.num_scales))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Code of shape `(channels, height, width)` for features of shape `(batch_size, channels, height, width)`."""
        codes = torch.stack([embedder(features) for embedder in self.embedders])
        return torch.einsum("n,nchw->chw", self.combination.softmax(dim=0), codes)


POSITIONAL_EMBEDDINGS = {
    "learnable-fourier": ContinuousThoughtMachineFourierEmbedding,
    "multi-learnable-fourier": ContinuousThoughtMachineMultiFourierEmbedding,
    "custom-rotational": ContinuousThoughtMachineRotationalEmbedding,
    "custom-rotational-1d": ContinuousThoughtMachineRotationalEmbedding1D,
}


class ContinuousThoughtMachineEncoder(nn.Module):
    """What the machine looks at: backbone, code of positions, and the projection to key tokens."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        if config.positional_embedding_type == "none":
            self.positional_embedding = None
        else:
            self.positional_embedding = POSITIONAL_EMBEDDINGS[config.positional_embedding_type](config.d_backbone)
        self.projection = nn.Linear(config.d_backbone, config.d_input)
        self.norm = nn.LayerNorm(config.d_input)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs (`torch.FloatTensor`): As the backbone reads it; see [`ContinuousThoughtMachineModel.forward`].

        Returns:
            Key tokens, `torch.FloatTensor` of shape `(batch_size, number of positions, d_input)`.

        Raises:
            ValueError: the input has the wrong number of dimensions, channels or pixels.
        """
        self.check(inputs)
        if self.config.backbone_type != "parity_backbone":
            inputs = inputs.to(self.projection.weight.dtype)
        features = self.backbone(inputs)
        if self.positional_embedding is not None:
            features = features + self.positional_embedding(features)
        return self.norm(self.projection(features.flatten(2).transpose(1, 2)))

    def check(self, inputs: torch.Tensor) -> None:
        """Raises the `ValueError` of `forward`."""
        config, shape = self.config, tuple(inputs.shape)
        if config.input_name == "input_values":
            if len(shape) != 2:
                raise ValueError(f"input_values must be of shape (batch_size, length), got {shape}")
            return
        if config.input_name == "input_features":
            if len(shape) < 3 or shape[1] != config.num_channels:
                raise ValueError(
                    f"input_features must be of shape (batch_size, num_channels={config.num_channels}, positions…), "
                    f"got {shape}"
                )
            return
        if len(shape) != 4 or shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values must be of shape (batch_size, num_channels={config.num_channels}, height, width), "
                f"got {shape}"
            )
        if config.image_size is not None:
            sizes = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
            if list(shape[2:]) != sizes:
                raise ValueError(
                    f"pixel_values must be images of image_size={sizes[0]}x{sizes[1]}, got {shape[2]}x{shape[3]}"
                )
