"""The one place where FP8 codes are multiplied: in hardware, or emulated from the same codes.

Both operands come with the dimension that is summed over last, which is how the hardware wants them; the product of
``left [M, K]`` and ``right [N, K]`` is ``left rightᵀ [M, N]``.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fp8rl_torchrl.precision.capability import Backend, has_grouped_products
from fp8rl_torchrl.precision.quantize import DTYPES

ALIGNMENT = 16
"""The hardware wants K and N to be multiples of this; they are padded with zeros."""


def scaled_matmul(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    fast_accum: bool = False,
    backend: Backend = "emulated",
) -> torch.Tensor:
    """Multiply FP8 codes and undo their scales: ``(left / left_scale) (right / right_scale)ᵀ``.

    Emulated, the products of the codes are exact in FP32, their sum is FP32, and the scales follow. Native, the tensor
    cores multiply the same codes; `native_kernel` says which kernel runs.

    Args:
        left: FP8 codes ``[..., M, K]``.
        left_scale: float32 ``[..., M, 1]`` or ``[..., 1, 1]``.
        right: FP8 codes ``[..., N, K]``; leading dimensions are broadcast.
        right_scale: float32 ``[..., N, 1]`` or ``[..., 1, 1]``.
        out_dtype: Of the result. It is the last rounding, and the only one besides those of the sum.
        fast_accum: Native only: see `fp8rl_torchrl.precision.recipe.Gemm`.
        backend: ``native`` or ``emulated``; `fp8rl_torchrl.precision.capability.choose_backend` picks one.

    Returns:
        ``[..., M, N]``.

    Raises:
        TypeError: If an operand is not made of FP8 codes.
        ValueError: If there is no such backend.
    """
    for operand in (left, right):
        if operand.dtype not in DTYPES.values():
            raise TypeError(f"scaled_matmul multiplies FP8 codes, which quantize makes; got {operand.dtype}")
    if backend not in ("native", "emulated"):
        raise ValueError(f"backend must be 'native' or 'emulated'; got {backend!r}")
    scales = left_scale.reciprocal(), right_scale.reciprocal()
    with torch.autocast(left.device.type, enabled=False):
        if 0 in left.shape or 0 in right.shape:
            batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
            return left_scale.new_zeros((*batch, left.shape[-2], right.shape[-2]), dtype=out_dtype)
        if backend == "emulated":
            return _emulated(left, scales[0], right, scales[1]).to(out_dtype)
        return _native(left, scales[0], right, scales[1], out_dtype, fast_accum)


def native_kernel(row_scaled: bool, out_dtype: torch.dtype) -> str:
    """Which native kernel a product takes, in words.

    The kernel that applies one scale a row returns BF16 only. For other dtypes, the kernel that applies one scale a
    tensor multiplies the bare codes into FP32, and the scales follow.
    """
    if row_scaled and out_dtype == torch.bfloat16:
        return "rowwise kernel, BF16"
    return "tensorwise kernel, FP32, scales after" if row_scaled else f"tensorwise kernel, {_name(_kernel(out_dtype))}"


# --- emulated ---


def _emulated(left: torch.Tensor, left_factor: torch.Tensor, right: torch.Tensor, right_factor: torch.Tensor):
    # The codes are multiplied before they are scaled: also where FP32 products run in TF32, codes survive that.
    product = torch.matmul(_decode(left), _decode(right).mT)
    return product.mul_(left_factor * _unit(left)).mul_((right_factor * _unit(right)).mT)


def _decode(codes: torch.Tensor) -> torch.Tensor:
    """The codes as float32, in units of `_unit`, but for those that are not finite (they may become some number)."""
    if _converted_in_bulk(codes):
        return codes.float()
    # PyTorch converts FP8 on a CPU one by one. FP16 has the same layout with more bits, and converts ten times faster:
    # e5m2 is FP16 without its lower byte; e4m3's exponent is 8 less, so a shift gives 1/256 of the number.
    if codes.dtype == torch.float8_e5m2:
        return (codes.view(torch.int8).to(torch.int16) << 8).view(torch.float16).float()
    sign_and_shifted = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return sign_and_shifted.view(torch.float16).float()


def _unit(codes: torch.Tensor) -> torch.Tensor | float:
    """What a 1 from `_decode` stands for; NaN for each row that holds one that was not decoded: ``[..., R, 1]``."""
    if codes.dtype == torch.float8_e5m2 or _converted_in_bulk(codes):
        return 1.0
    not_finite = (codes.view(torch.int8) & 0x7F).amax(-1, keepdim=True) == 0x7F
    return torch.where(not_finite, float("nan"), 256.0)


def _converted_in_bulk(codes: torch.Tensor) -> bool:
    """Whether PyTorch converts FP8 many codes at a time: everywhere but on a CPU in eager mode.

    What a compiler makes of one conversion runs three times as fast as what it makes of the shifts, and compiles
    faster. While it traces what Dynamo took as it is, only the modes on the dispatch stack tell.
    """
    return codes.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# --- native ---


def _native(
    left: torch.Tensor,
    left_factor: torch.Tensor,
    right: torch.Tensor,
    right_factor: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    features = right.shape[-2]
    left, right = _pad(left, -1), _pad(_pad(right, -1), -2)
    if right_factor.shape[-2] > 1:
        right_factor = F.pad(right_factor, (0, 0, 0, right.shape[-2] - features))
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    if not batch:
        product = _native_2d(left, left_factor, right, right_factor, out_dtype, fast_accum)
    elif right.dim() == 2:
        # One right operand for all: the rows of all left ones make one product.
        rows = left_factor.expand(*left.shape[:-1], 1).reshape(-1, 1)
        product = _native_2d(left.flatten(0, -2), rows, right, right_factor, out_dtype, fast_accum)
        product = product.unflatten(0, left.shape[:-1])
    else:
        product = _native_ensemble(batch, left, left_factor, right, right_factor, out_dtype, fast_accum)
    return product[..., :features]


def _native_2d(
    left: torch.Tensor,
    left_factor: torch.Tensor,
    right: torch.Tensor,
    right_factor: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    left, right = _row_major(left), _row_major(right).t()
    factors = left_factor, right_factor.t()
    row_scaled = left_factor.numel() > 1 or right_factor.numel() > 1
    scale_after = row_scaled and out_dtype != torch.bfloat16
    if scale_after:
        kernel_factors = (left_factor.new_ones(()), left_factor.new_ones(()))
    elif row_scaled:
        kernel_factors = (
            factors[0].expand(left.shape[0], 1).contiguous(),
            factors[1].expand(1, right.shape[1]).contiguous(),
        )
    else:
        kernel_factors = (factors[0].reshape(()), factors[1].reshape(()))
    dtype = torch.float32 if scale_after else _kernel(out_dtype)
    product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        left, right, *kernel_factors, out_dtype=dtype, use_fast_accum=fast_accum
    )
    if scale_after:
        product = product * factors[0] * factors[1]
    return product.to(out_dtype)


def _native_ensemble(
    batch: torch.Size,
    left: torch.Tensor,
    left_factor: torch.Tensor,
    right: torch.Tensor,
    right_factor: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    """One grouped product where there is one (rowwise kernel, e4m3 into BF16), else a launch a member."""
    operands = [operand.expand(*batch, *operand.shape[-2:]).flatten(0, len(batch) - 1) for operand in (left, right)]
    factors = [
        factor.expand(*batch, operand.shape[-2], 1).flatten(0, len(batch) - 1)
        if out_dtype == torch.bfloat16
        else factor.expand(*batch, *factor.shape[-2:]).flatten(0, len(batch) - 1)
        for factor, operand in zip((left_factor, right_factor), operands, strict=True)
    ]
    takes_them = left.dtype == right.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16
    if takes_them and left.device.type == "cuda" and has_grouped_products(left.device):
        product = torch._scaled_grouped_mm(  # pyright: ignore[reportPrivateImportUsage]
            _row_major(operands[0]),
            _row_major(operands[1]).mT,
            factors[0].squeeze(-1).contiguous(),
            factors[1].squeeze(-1).contiguous(),
            out_dtype=out_dtype,
            use_fast_accum=fast_accum,
        )
    else:
        members = zip(operands[0], factors[0], operands[1], factors[1], strict=True)
        product = torch.stack([_native_2d(*member, out_dtype, fast_accum) for member in members])
    return product.unflatten(0, batch)


def _pad(codes: torch.Tensor, dim: int) -> torch.Tensor:
    missing = -codes.shape[dim] % ALIGNMENT
    if not missing:
        return codes
    widths = (0, missing) if dim == -1 else (0, 0, 0, missing)
    return F.pad(codes.view(torch.uint8), widths).view(codes.dtype)  # code 0 is the number 0


def _row_major(codes: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the strides of a full matrix also where there is one row, whose stride could be anything."""
    return codes.flatten().view(codes.shape)


def _kernel(out_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel with one scale a tensor writes."""
    return out_dtype if out_dtype in (torch.bfloat16, torch.float16) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "BF16", torch.float16: "FP16"}.get(dtype, "FP32")
