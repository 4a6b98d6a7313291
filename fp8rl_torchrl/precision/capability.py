"""What a device runs in FP8 hardware, and what it emulates."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["native", "emulated"]

MIN_CAPABILITY = (8, 9)
"""CUDA capability from which a GPU multiplies FP8: 8.9 is Ada, 9.0 Hopper, 10.0 Blackwell."""


@dataclass(frozen=True)
class Float8Capability:
    """How one device multiplies FP8 codes.

    Args:
        device: The device.
        hardware: Its name.
        backend: ``native`` or ``emulated``; None where there is no FP8 at all.
        ensembles: How products of a whole ensemble run.
        reason: Why this is so.
    """

    device: str
    hardware: str
    backend: Backend | None
    ensembles: str
    reason: str


@functools.cache
def float8_capability(device: torch.device | str) -> Float8Capability:
    """What a device does with FP8 codes.

    Args:
        device: Any device of this machine. Asking about a CUDA device starts CUDA.

    Example:
        >>> float8_capability("cpu").backend
        'emulated'
    """
    device = torch.device(device)
    if device.type == "cpu":
        return Float8Capability(
            str(device), _cpu_name(), "emulated", "batched products", "no FP8 hardware is used; slower than FP32"
        )
    if device.type == "cuda" and torch.version.hip is not None:
        return Float8Capability(
            str(device),
            torch.cuda.get_device_name(device),
            "emulated",
            "batched products",
            "AMD: FP8 hardware is not used, since its formats differ between generations; untested",
        )
    if device.type == "cuda":
        return _nvidia(device)
    if device.type == "mps":
        return Float8Capability(
            str(device),
            f"Apple {platform.processor()}".strip(),
            None,
            "none",
            "MPS: no e5m2, and e4m3 only from PyTorch 2.15 on; untested, so it is refused: use the CPU",
        )
    return Float8Capability(str(device), device.type, "emulated", "batched products", "unknown device; untested")


def _nvidia(device: torch.device) -> Float8Capability:
    major, minor = torch.cuda.get_device_capability(device)
    name, version = torch.cuda.get_device_name(device), f"capability {major}.{minor}"
    if (major, minor) < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        return Float8Capability(
            str(device), name, "emulated", "batched products", f"{version}; FP8 needs {needed} or later"
        )
    grouped = "one grouped product (e4m3 into BF16), else a launch a member"
    ensembles = grouped if has_grouped_products(device) else "a launch a member"
    return Float8Capability(str(device), name, "native", ensembles, version)


def has_grouped_products(device: torch.device) -> bool:
    """Whether PyTorch multiplies a whole ensemble of FP8 matrices at once here: on Hopper."""
    return hasattr(torch, "_scaled_grouped_mm") and torch.cuda.get_device_capability(device) == (9, 0)


def choose_backend(device: torch.device | str, backend: str = "auto") -> Backend:
    """The backend to use: the one asked for, or the best that the device has.

    Args:
        device: The device that the product runs on.
        backend: ``auto``, ``native`` or ``emulated``. ``native`` on a CPU runs PyTorch's reference kernel, for tests.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If the device has no FP8, or not the backend that was asked for.
    """
    if backend not in ("auto", "native", "emulated"):
        raise ValueError(f"backend must be 'auto', 'native' or 'emulated'; got {backend!r}")
    device = torch.device(device)
    if device.type == "cpu":
        return "native" if backend == "native" else "emulated"
    found = float8_capability(device)
    if found.backend is None:
        raise RuntimeError(f"no FP8 on {found.device}: {found.reason}")
    if backend == "native" and found.backend != "native":
        raise RuntimeError(f"no native FP8 products on {found.hardware} ({found.reason}); use backend='emulated'")
    return found.backend if backend == "auto" else backend  # pyright: ignore[reportReturnType]


def capability_table() -> str:
    """A table of what this machine runs natively and what it emulates."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    found = [float8_capability(device) for device in devices]
    header = ("device", "hardware", "FP8 products", "ensembles", "why")
    rows = [(f.device, f.hardware, f.backend or "none", f.ensembles, f.reason) for f in found]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _cpu_name() -> str:
    return torch.backends.cpu.get_cpu_capability() + " " + (platform.processor() or platform.machine())
