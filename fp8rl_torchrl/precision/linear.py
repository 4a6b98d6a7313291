"""`Float8Linear`: a linear layer whose three matrix products multiply FP8 codes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from fp8rl_torchrl.precision.capability import choose_backend
from fp8rl_torchrl.precision.linear_function import add_bias, float8_product
from fp8rl_torchrl.precision.matmul import native_kernel
from fp8rl_torchrl.precision.recipe import RECIPES


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8, forward and backward, on FP32 master weights.

    Input, weight and gradient are cast as the recipe says, with scales taken from the tensors themselves at every
    call. Inside autocast the input is first brought to autocast's dtype, which is also the output's; outside, the
    output has the input's dtype. The gradient of the weight has the weight's dtype. The bias is added in the output's
    dtype. A value that is not finite makes all that depends on its scale NaN.

    It works under `torch.func` (`vmap`, `grad`, `functional_call`), `torch.compile(fullgraph=True)`, in CUDA graphs,
    autocast and inference mode, and its ``state_dict`` is that of `torch.nn.Linear`. It cannot be differentiated
    twice, since the derivative of rounding is zero: that raises.

    Where no gradient is needed (rollouts, target networks), on a CPU and in eager mode, the codes of a weight are kept
    until the weight changes. Elsewhere each call casts the weight anew.

    Args:
        in_features: Size of the input, K.
        out_features: Size of the output, N.
        bias: Whether there is a bias.
        device: Where the parameters are.
        dtype: Of the parameters; masters are float32.
        recipe: ``rowwise``, ``tensorwise`` or ``rowwise-gw-hp``; see `Float8Recipe`.
        backend: ``native``, ``emulated``, or ``auto`` for what the device has.

    Raises:
        ValueError: If the recipe or the backend is unknown.

    Example:
        >>> layer = Float8Linear(32, 48)
        >>> layer(torch.ones(4, 32)).shape
        torch.Size([4, 48])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str = "rowwise",
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set(recipe, backend)

    def _set(self, recipe: str, backend: str) -> None:
        if recipe not in RECIPES:
            raise ValueError(f"unknown FP8 recipe {recipe!r}; use one of {', '.join(RECIPES)}")
        choose_backend(torch.device("cpu"), backend)  # refuses unknown names
        self.recipe, self.backend = recipe, backend

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str = "rowwise", backend: str = "auto") -> Float8Linear:
        """A Float8Linear on the very parameters of a linear layer, with its hooks and its mode.

        Args:
            linear: The layer; it is not changed.
            recipe: As above.
            backend: As above.

        Raises:
            TypeError: If the layer is a subclass, such as a lazy or a parametrized one: what it adds would be lost.
        """
        if type(linear) not in (nn.Linear, Float8Linear):
            raise TypeError(
                f"from_linear takes a torch.nn.Linear; got a {type(linear).__name__}, whose own ways would be lost"
            )
        layer = _on_the_state_of(linear, cls)
        layer._set(recipe, backend)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain linear layer on the same parameters."""
        layer = _on_the_state_of(self, nn.Linear)
        del layer.recipe, layer.backend
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to ``[..., N]``.

        Raises:
            ValueError: If the last dimension is not K.
            TypeError: If the input is not floating-point.
        """
        if not input.is_floating_point():
            raise TypeError(f"Float8Linear takes floating-point input; got {input.dtype}")
        if not input.dim() or input.shape[-1] != self.in_features:
            raise ValueError(f"Float8Linear expects input [..., {self.in_features}]; got {list(input.shape)}")
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        rows = input.reshape(input.shape[:-1].numel(), self.in_features)
        output = float8_product(rows, self.weight, self.recipe, self.backend)
        output = output.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else add_bias(output, self.bias)

    def extra_repr(self) -> str:
        """The shape, and what each product multiplies on the parameters' device."""
        runs = self.runs()
        return f"{super().extra_repr()}, recipe={self.recipe}, {runs}, {products_in_words(self.recipe, runs)}"

    def runs(self) -> str:
        """``native`` or ``emulated`` on the device where the weight is, or why it cannot run there."""
        try:
            return choose_backend(self.weight.device, self.backend)
        except RuntimeError as error:
            return f"cannot run: {error}"


def products_in_words(recipe: str, backend: str) -> str:
    """The operands of a recipe's products and, native, the kernel that runs inside BF16 autocast and how it sums."""
    products = RECIPES[recipe]
    words = []
    for name, out_dtype in (("output", torch.bfloat16), ("grad_input", torch.bfloat16), ("grad_weight", torch.float32)):
        gemm = getattr(products, name)
        words.append(f"{name}: {gemm or 'high precision'}")
        if gemm is not None and backend == "native":
            row_scaled = "row" in (gemm.left.scaling, gemm.right.scaling)
            words[-1] += f" [{native_kernel(row_scaled, out_dtype)}{', fast sum' if gemm.fast_accum else ''}]"
    return ", ".join(words)


Layer = TypeVar("Layer", bound=nn.Linear)


def _on_the_state_of(linear: nn.Linear, kind: type[Layer]) -> Layer:
    """A layer of some kind that has the parameters, hooks and mode of another, but containers of its own for them."""
    layer = kind.__new__(kind)
    layer.__dict__ = {
        key: each.copy() if isinstance(each, (dict, set)) else each for key, each in linear.__dict__.items()
    }
    return layer
