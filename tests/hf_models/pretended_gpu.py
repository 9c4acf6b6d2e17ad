"""
A training step of every class on a device that only pretends to be one: `python -m tests.hf_models.pretended_gpu`.

A GPU refuses to compute with a tensor that was left on the CPU, and so does this device; a CPU never notices. Tensors
on it are torch's `FakeTensor`s: they have shape, dtype and device, but no values, and an operation on tensors of two
devices raises. (A fake tensor may claim to be on a GPU, but autograd then asks a build of torch that knows one; a
backend in Python, which any build takes, stands in for it.) What depends on values, like halting samples at inference,
cannot be followed.

The backend changes its whole process, so that this is a command of its own: it prints `{"name": error or null}`.
"""

import inspect
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from hf_models.continuous_thought_machine.modeling_continuous_thought_machine import ContinuousThoughtMachineModel
from tests.hf_models.model_tests import ModelTests, main_output
from tests.hf_models.test_connection_transformer import TestConnectionTransformer
from tests.hf_models.test_continuous_thought_machine import TestContinuousThoughtMachine
from tests.hf_models.test_in_context_transformer import TestInContextTransformer, TestLowRankInContextTransformer
from tests.hf_models.test_vanilla_transformer import TestVanillaTransformer

SUITES: tuple[type[ModelTests], ...] = (
    TestVanillaTransformer,
    TestConnectionTransformer,
    TestContinuousThoughtMachine,
    TestInContextTransformer,
    TestLowRankInContextTransformer,
)
NAME = "pretended"
DEVICE = f"{NAME}:0"


class Backend(_DummyBackendModule):
    """What torch asks the module of a device for in a training step."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device(self, index: int) -> AbstractContextManager:
        return nullcontext()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        assert state.device.type == "cpu"


def on_device(value: Any) -> Any:
    """A tensor of the same shape and dtype on the device; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype, device=DEVICE) if isinstance(value, torch.Tensor) else value


def move(model: nn.Module) -> None:
    """Puts parameters and buffers on the device; tied ones stay tied. A tensor held otherwise stays where it is."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    new = on_device(tensor)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    moved[id(tensor)] = new, tensor  # holds on to the old one, whose id must not be given again
                tensors[name] = moved[id(tensor)][0]


def training_step(suite: ModelTests, model_class: type[PreTrainedModel], implementation: str) -> None:
    """Forward and backward pass in training mode. Raises `RuntimeError` for a tensor that is left on the CPU."""
    model = suite.build(model_class).train()
    model.set_attn_implementation(implementation)
    batch = suite.inputs(model_class, 3, model.config, suite.padding_sides[0] if suite.padding_sides else None)
    # Fake tensors are no `torch.Tensor`s by type, which the ticks at once ask for.
    at_once = mock.patch.object(ContinuousThoughtMachineModel, "can_think_at_once", return_value=True)
    with FakeTensorMode(allow_non_fake_inputs=False), at_once:
        move(model)
        # The Connection Transformer refuses rows without a token, for which it looks at the mask's values.
        without = {"attention_mask"} if isinstance(suite, TestConnectionTransformer) else set()
        inputs = {name: on_device(value) for name, value in batch.items() if name not in without}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False
        outputs = model(**inputs)
        loss = outputs.loss if "labels" in inputs else main_output(outputs).float().sum()
        assert str(loss.device) == DEVICE, loss.device
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.device == parameter.device, name


class Forgetful(TestVanillaTransformer):
    """A suite whose models add a tensor that was made on the CPU, to show that it is noticed."""

    def build(self, model_class, *args, **kwargs):
        model = super().build(model_class, *args, **kwargs)
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, output: output + torch.zeros(output.shape[-1])
        )
        return model


def main() -> None:
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Backend())
    # As in a fake mode on a machine without a GPU: `torch.tensor` makes its tensor on the CPU and then moves it.
    torch._C._set_only_lift_cpu_tensors(True)
    found = {}
    for suite_class in (*SUITES, Forgetful):
        suite = suite_class()
        classes = list(suite.classes)[:1] if suite_class is Forgetful else suite.classes
        for model_class in classes:
            for implementation in ("eager", "sdpa"):
                name = f"{suite_class.__name__} {model_class.__name__} {implementation}"
                try:
                    training_step(suite, model_class, implementation)
                    found[name] = None
                except Exception as error:
                    found[name] = f"{type(error).__name__}: {error}"
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
