"""`Precision`: an immutable value that says in which format each part of learning runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_AVAILABLE = ("fp32", "tf32", "bf16", "fp16")
_PLANNED = ("fp8", "fp8-rowwise", "fp8-tensorwise", "fp8-rowwise-gw-hp")


@dataclass(frozen=True)
class Precision:
    """Which number format the loss, or a policy, computes in.

    Parameters and optimizer moments are FP32 in every precision; only the arithmetic changes:

    | name | matrix products | the rest | loss scaling |
    |---|---|---|---|
    | ``fp32`` | FP32 | FP32 | no |
    | ``tf32`` | TF32 on CUDA devices that have it (capability 8.0 and later), else FP32 with a warning | FP32 | no |
    | ``bf16`` | BF16 under autocast | as autocast chooses | no |
    | ``fp16`` | FP16 under autocast | as autocast chooses | yes |

    Args:
        name: One of the names above.
        init_scale: The first loss scale of ``fp16``; a power of two loses no bits.
        growth_interval: The loss scale doubles after this many updates without an overflow.

    Raises:
        ValueError: If the name is unknown (the message lists the names) or not available in this version, or a number
            is out of range.

    Example:
        >>> Precision("bf16").autocast_dtype
        torch.bfloat16
    """

    name: str
    init_scale: float = 2.0**16
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.name in _PLANNED:
            raise ValueError(
                f"precision {self.name!r} is not available in this version: FP8 matrix products are yet to come; "
                f"use one of {', '.join(_AVAILABLE)}"
            )
        if self.name not in _AVAILABLE:
            raise ValueError(f"unknown precision {self.name!r}; use one of {', '.join(_AVAILABLE)}")
        if not 0 < self.init_scale < float("inf"):
            raise ValueError(f"init_scale must be > 0 and finite; got {self.init_scale}")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval must be >= 1; got {self.growth_interval}")

    @classmethod
    def of(cls, precision: Precision | str) -> Precision:
        """The precision itself, or the one of that name."""
        return precision if isinstance(precision, Precision) else cls(precision)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that this version accepts."""
        return _AVAILABLE

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast runs in, or None where there is no autocast."""
        return _AUTOCAST.get(self.name)

    @property
    def scales_loss(self) -> bool:
        """Whether the gradients need a loss scale: FP16's smallest number is 6e-8, BF16's range is FP32's."""
        return self.name == "fp16"

    @contextlib.contextmanager
    def autocast(self, device: torch.device | str) -> Iterator[None]:
        """Run the block's forward pass in this precision.

        Args:
            device: The device that the block computes on.

        Warns:
            UserWarning: If ``tf32`` is asked of a device that has none; the block then runs in FP32.
        """
        device = torch.device(device)
        dtype = self.autocast_dtype
        products = _tf32(device) if self.name == "tf32" else contextlib.nullcontext()
        # Without a dtype of its own, the block must not run in that of a surrounding autocast.
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None), products:
            yield


def has_tf32(device: torch.device | str) -> bool:
    """Whether a device has TF32 matrix products: an NVIDIA GPU of capability 8.0 or later."""
    device = torch.device(device)
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    if not has_tf32(device):
        warnings.warn(f"{device.type} has no TF32: precision 'tf32' runs FP32 there", UserWarning, stacklevel=5)
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
