"""One forward pass in readable form: what every stage is given and gives, and why a model that thinks stopped."""

from .inputs import ModelInputs, prepare
from .records import STAGES, Record, Statistics, statistics_of
from .walk import Walk, recorded

__all__ = ["STAGES", "ModelInputs", "Record", "Statistics", "Walk", "prepare", "recorded", "statistics_of"]
