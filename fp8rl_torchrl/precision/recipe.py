"""`Float8Recipe`: which FP8 format and which scales each matrix product of a linear layer uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["e4m3", "e5m2"]
Scaling = Literal["row", "tensor"]

_KNOWN = {"format": get_args(Format), "scaling": get_args(Scaling)}


@dataclass(frozen=True)
class Cast:
    """How one operand of a product becomes FP8 codes.

    Args:
        format: ``e4m3`` (3 bits of mantissa, to ±448) or ``e5m2`` (2 bits, to ±57344).
        scaling: ``row``, one scale for each row along the dimension that the product sums over; or ``tensor``, one for
            the whole operand.
        power_of_two: Round the scale down to a power of two, so that scaling itself rounds nothing.

    Raises:
        ValueError: If the format or the scaling is none of these.
    """

    format: Format
    scaling: Scaling
    power_of_two: bool = True

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown FP8 {name} {getattr(self, name)!r}; use one of {', '.join(known)}")

    def __str__(self) -> str:
        """Such as ``e4m3/row``."""
        return f"{self.format}/{self.scaling}"


@dataclass(frozen=True)
class Gemm:
    """One matrix product: its operands in FP8, and how the hardware sums.

    Args:
        left: How the left operand is cast.
        right: How the right operand is cast.
        fast_accum: Native products only: sum in the tensor cores' own accumulator, which is faster and keeps about 14
            bits, instead of promoting partial sums to FP32.
    """

    left: Cast
    right: Cast
    fast_accum: bool = False

    def __str__(self) -> str:
        """Such as ``e4m3/row × e4m3/row``."""
        return f"{self.left} × {self.right}"


@dataclass(frozen=True)
class Float8Recipe:
    """The three matrix products of a linear layer, forward and backward.

    With input ``x [M, K]``, weight ``w [N, K]`` and the gradient of the output ``g [M, N]``:

    | product | computes | sums over | left × right |
    |---|---|---|---|
    | ``output`` | ``x wᵀ`` | K | input × weight |
    | ``grad_input`` | ``g w`` | N | gradient × weight |
    | ``grad_weight`` | ``gᵀ x`` | M | gradient × input |

    The recipes follow torchao's ``rowwise``, ``tensorwise`` and ``rowwise_with_gw_hp``, so that results can be compared
    bit by bit:

    | recipe | activations and weights | gradients | scales | saved for backward, per input element |
    |---|---|---|---|---|
    | ``rowwise`` | e4m3 | e4m3 | one a row, powers of two | 1 byte: codes along M |
    | ``tensorwise`` | e4m3 | e5m2 | one a tensor, not rounded | 1 byte: the codes of the forward product |
    | ``rowwise-gw-hp`` | e4m3 | e4m3 | one a row; ``grad_input``'s weight one a tensor | 4 bytes, 2 in BF16 |

    ``rowwise-gw-hp`` computes ``grad_weight`` in high precision, so it saves the input as it came. All save a reference
    to the FP32 weight, which costs nothing, and cast it anew for ``grad_input``.

    Args:
        name: The recipe's name.
        output: The forward product.
        grad_input: The gradient of the input.
        grad_weight: The gradient of the weight; None computes it in high precision.
    """

    name: str
    output: Gemm
    grad_input: Gemm
    grad_weight: Gemm | None


def _rowwise() -> Float8Recipe:
    row = Cast("e4m3", "row")
    # As in torchao, the forward product may sum fast, the gradients may not.
    return Float8Recipe("rowwise", Gemm(row, row, fast_accum=True), Gemm(row, row), Gemm(row, row))


def _tensorwise() -> Float8Recipe:
    forward, gradient = Cast("e4m3", "tensor", power_of_two=False), Cast("e5m2", "tensor", power_of_two=False)
    return Float8Recipe(
        "tensorwise", Gemm(forward, forward, fast_accum=True), Gemm(gradient, forward), Gemm(gradient, forward)
    )


def _rowwise_gw_hp() -> Float8Recipe:
    row = Cast("e4m3", "row")
    return Float8Recipe("rowwise-gw-hp", Gemm(row, row, fast_accum=True), Gemm(row, Cast("e4m3", "tensor")), None)


RECIPES: dict[str, Float8Recipe] = {recipe.name: recipe for recipe in (_rowwise(), _tensorwise(), _rowwise_gw_hp())}
"""The recipes by name."""
