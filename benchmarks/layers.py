"""One linear layer to measure: its forward and backward pass in a precision, and what is to know about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fp8rl_torchrl import Precision
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.matmul import native_kernel
from fp8rl_torchrl.precision.recipe import RECIPES


def device_of(name: str) -> torch.device:
    """The device of a name, where ``auto`` is cuda if there is one.

    Raises:
        RuntimeError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None


def device_name(device: torch.device, environment: dict[str, Any]) -> str:
    """The GPU's name, or the CPU's.

    Args:
        device: The device.
        environment: What the record was made with.
    """
    if device.type != "cuda":
        return f"{environment['hardware']['cpu']}, one core"
    return environment["hardware"]["gpus"][device.index or 0]


class Layer:
    """One linear layer with its input and the gradient of its output.

    Args:
        mode: The name of a `Precision`.
        width: Inputs and outputs.
        batch: Rows of the input.
        device: Where it is.
        seed: Of parameters and data: the same in every mode.
    """

    def __init__(self, mode: str, width: int, batch: int, device: torch.device, seed: int = 0) -> None:
        self.precision, self.device = Precision(mode), device
        torch.manual_seed(seed)
        linear = nn.Linear(width, width, device=device)
        recipe = self.precision.fp8_recipe
        self.module = linear if recipe is None else Float8Linear.from_linear(linear, recipe=recipe)
        dtype = self.precision.autocast_dtype or torch.float32
        self.input = torch.randn(batch, width, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(batch, width, device=device).to(dtype)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = self.module

    def compiled(self) -> Layer:
        """The same layer, compiled for its shape; it is compiled at the first step."""
        other = object.__new__(Layer)
        other.__dict__ = self.__dict__ | {"forward": torch.compile(self.module, fullgraph=True, dynamic=False)}
        return other

    def step(self) -> None:
        """Forward and backward: the gradients of input, weight and bias."""
        if self.device.type == "cuda":  # also for backward, which runs outside of the precision's context
            torch.backends.cuda.matmul.allow_tf32 = self.precision.name == "tf32"
        with self.precision.autocast(self.device):
            output = self.forward(self.input)
        torch.autograd.grad(output, (self.input, *self.module.parameters()), self.grad)

    def captured(self, pool: Any = None) -> Callable[[], None]:
        """The step as a CUDA graph, to be replayed.

        Args:
            pool: Memory to share with other graphs, none of which needs what another has left there.
        """
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.step()
        return graph.replay

    def saved_bytes(self) -> int:
        """What a forward pass keeps for backward, parameters not counted: whole storages, each once."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, self.precision.autocast(self.device):
            self.forward(self.input)
        return sum(size for place, size in storages.items() if place not in parameters)

    def products(self) -> dict[str, str]:
        """What multiplies in each of the three products, in words."""
        recipe, base = self.precision.fp8_recipe, self.precision.autocast_dtype or torch.float32
        if recipe is None:
            return dict.fromkeys(("output", "grad_input", "grad_weight"), self.precision.name)
        assert isinstance(self.module, Float8Linear)
        native, said = self.module.runs() == "native", {}
        for name, dtype in (("output", base), ("grad_input", base), ("grad_weight", torch.float32)):
            gemm = getattr(RECIPES[recipe], name)
            if gemm is None:
                said[name] = "bf16"
            else:
                rows = "row" in (gemm.left.scaling, gemm.right.scaling)
                said[name] = native_kernel(rows, dtype) if native else "emulated"
        return said
