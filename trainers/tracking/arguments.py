"""The `tracking` section of a recipe: what is watched inside a model while it trains."""

from dataclasses import dataclass, field

from huggingface_hub.dataclasses import strict


@strict
@dataclass(kw_only=True)
class TrackingArguments:
    """What is watched inside a model while it trains. Off unless `every` is set; then training costs nothing extra.

    Raises:
        ValueError: naming a field whose value is out of range, or that is set although tracking is off.
    """

    every: int | None = field(
        default=None,
        metadata={"help": "Look inside at the first update step and at every multiple of this one. Default: never."},
    )
    names: str | list | None = field(
        default=None,
        metadata={
            "help": "Modules to watch: a name, a glob such as 'decoder.*', or a list of these. Default: every "
            "attention module, sublayer and layer."
        },
    )
    probe_examples: int = field(
        default=2,
        metadata={"help": "Number of fixed validation examples whose attention and residual stream are taken apart."},
    )
    maps: int = field(
        default=12,
        metadata={"help": "Most steps whose attention maps are kept and drawn; more are thinned out evenly."},
    )
    updates: bool = field(
        default=True,
        metadata={"help": "Measure by how much tracked updates move the weights, on a part of each large matrix."},
    )
    stop_on_nonfinite: bool = field(
        default=False,
        metadata={"help": "Stop when a tracked step meets NaN or infinity inside the model, instead of reporting it."},
    )

    def validate_ranges(self) -> None:
        if self.every is None and self.names is not None:
            raise ValueError("tracking.names is set, but tracking.every is not")
        for name, least in {"every": 1, "probe_examples": 1, "maps": 2}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"tracking.{name} is {value}; it must be at least {least}")
        if isinstance(self.names, list) and not (self.names and all(isinstance(name, str) for name in self.names)):
            raise ValueError(f"tracking.names is {self.names!r}; it must be a name or a list of names")
