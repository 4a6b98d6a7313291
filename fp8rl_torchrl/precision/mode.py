"""`Precision`: an immutable value that says in which format each part of learning runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fp8rl_torchrl.precision.recipe import RECIPES

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP8 = {"fp8": "rowwise"} | {f"fp8-{recipe}": recipe for recipe in RECIPES}
_NAMES = ("fp32", "tf32", "bf16", "fp16", *_FP8)


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
    | ``fp8-rowwise``, or ``fp8`` | FP8 in every `Float8Linear`, else ``base`` | ``base`` | no |
    | ``fp8-tensorwise`` | likewise, with one scale a tensor and e5m2 gradients | ``base`` | no |
    | ``fp8-rowwise-gw-hp`` | likewise, with the weight's gradient in ``base`` | ``base`` | no |

    FP8 takes a model whose layers `fp8rl_torchrl.convert` has replaced by `Float8Linear`; `Float8Recipe` says what each
    name stands for.

    Args:
        name: One of the names above.
        init_scale: The first loss scale of ``fp16``; a power of two loses no bits.
        growth_interval: The loss scale doubles after this many updates without an overflow.

        base: FP8 only: what everything but the FP8 products runs in, ``bf16`` (under autocast) or ``fp32``.
        backend: FP8 only: ``native`` or ``emulated`` products, or ``auto`` for native ones where the device has them.

    Raises:
        ValueError: If the name is unknown (the message lists the names), a number is out of range, or an option does
            not go with the name.

    Example:
        >>> Precision("bf16").autocast_dtype
        torch.bfloat16
    """

    name: str
    init_scale: float = 2.0**16
    growth_interval: int = 2000
    base: str = "bf16"
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.name not in _NAMES:
            raise ValueError(f"unknown precision {self.name!r}; use one of {', '.join(_NAMES)}")
        if self.base not in ("bf16", "fp32"):
            raise ValueError(f"base must be 'bf16' or 'fp32'; got {self.base!r}")
        if self.backend not in ("auto", "native", "emulated"):
            raise ValueError(f"backend must be 'auto', 'native' or 'emulated'; got {self.backend!r}")
        if self.fp8_recipe is None and (self.base, self.backend) != ("bf16", "auto"):
            raise ValueError(f"base and backend are options of the fp8 precisions; {self.name!r} has neither")
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
        return _NAMES

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast runs in, or None where there is no autocast."""
        return _AUTOCAST.get(self.name if self.fp8_recipe is None else self.base)

    @property
    def fp8_recipe(self) -> str | None:
        """The name of the FP8 recipe (see `Float8Recipe`), or None where nothing runs in FP8."""
        return _FP8.get(self.name)

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
        # Without a dtype of its own, the block must not run in that of a surrounding autocast. Autocast keeps its casts
        # by weight alone, so inside a block of another format they must not be kept: they would be taken for its own.
        outermost = not torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=outermost), products:
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
