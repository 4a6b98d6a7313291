"""The differentiable product of a `Float8Linear`: three GEMMs on FP8 codes, batched by ``vmap``, kept for rollouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils.weak import WeakTensorKeyDictionary

from fp8rl_torchrl.precision.capability import choose_backend
from fp8rl_torchrl.precision.matmul import scaled_matmul
from fp8rl_torchrl.precision.quantize import DTYPES, quantize
from fp8rl_torchrl.precision.recipe import RECIPES, Cast, Gemm

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Codes and scale."""


# Dynamo takes the function as it is; the compiler behind it traces native products through, and fuses their casts.
@torch.compiler.allow_in_graph
def float8_product(input: torch.Tensor, weight: torch.Tensor, recipe: str, backend: str) -> torch.Tensor:
    """``input weightᵀ`` in FP8, with the gradients that the recipe says.

    Args:
        input: ``[M, K]``, any floating dtype; also the output's.
        weight: ``[N, K]``.
        recipe: The name of a `Float8Recipe`.
        backend: ``auto``, ``native`` or ``emulated``.

    Returns:
        ``[M, N]``. Differentiating its gradients once more raises a RuntimeError.
    """
    differentiated = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    if not differentiated and _keeps_codes(input, weight):
        gemm = RECIPES[recipe].output
        return _multiply(gemm, quantize(input, gemm.left), _kept_codes(weight, gemm.right), input.dtype, backend)
    return _Forward.apply(input, weight, recipe, backend)[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


@torch.compiler.allow_in_graph
def add_bias(output: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``output + bias`` in the output's dtype, also where a compiler would keep more bits than that has.

    Args:
        output: ``[..., N]``.
        bias: ``[N]``.
    """
    bias = bias.to(output.dtype)
    if not _is_traced():
        return output + bias
    rounded: Any = _Rounded.apply
    return rounded(output + rounded(bias))


def _multiply(gemm: Gemm, left: Quantized, right: Quantized, out_dtype: torch.dtype, backend: str) -> torch.Tensor:
    chosen = choose_backend(left[0].device, backend)
    product = scaled_matmul(*left, *right, out_dtype=out_dtype, fast_accum=gemm.fast_accum, backend=chosen)
    return _as_rounded(product).to(out_dtype)


def _turned(quantized: Quantized) -> Quantized:
    """The transpose of a matrix with one scale."""
    return quantized[0].mT, quantized[1].mT


def _as_rounded(x: torch.Tensor) -> torch.Tensor:
    """The very numbers of a BF16 tensor, as float32.

    A compiler that fuses the cast with what made the tensor would skip the rounding to BF16, and arrive at other codes.
    It cannot when the numbers are read by their bits.
    """
    if x.dtype != torch.bfloat16 or not _is_traced():
        return x
    return (x.view(torch.int16).to(torch.int32) << 16).view(torch.float32)


class _Rounded(torch.autograd.Function):
    """`_as_rounded`, in the dtype and with the gradient of what came in."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return _as_rounded(x).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _is_traced() -> bool:
    """Whether a compiler is looking on. In what Dynamo takes as it is, only its fake tensors tell."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and detect_fake_mode() is not None


def _output(operands: tuple[torch.Tensor, ...], recipe: str, backend: str) -> tuple[torch.Tensor, ...]:
    """The product ``output`` of input and weight, and what is saved for ``grad_weight``."""
    input, weight = operands
    products, out_dtype, input = RECIPES[recipe], input.dtype, _as_rounded(input)
    left, right = quantize(input, products.output.left), quantize(weight, products.output.right)
    output = _multiply(products.output, left, right, out_dtype, backend)
    if products.grad_weight is None:
        return (output,)
    cast = products.grad_weight.right
    # With one scale for all, the codes are the same, whichever way they are read.
    same = cast == products.output.left and cast.scaling == "tensor"
    left = _turned(left) if same else quantize(input.mT, cast)
    # As integers, which autograd, vmap and compilers leave alone.
    return output, left[0].view(torch.uint8), left[1]


def _gradients(
    operands: tuple[torch.Tensor, ...],
    recipe: str,
    backend: str,
    needs_input: bool,
    needs_weight: bool,
    input_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """The products ``grad_input`` and ``grad_weight``, those of them that are needed."""
    grad, weight, *saved = operands
    products, rounded = RECIPES[recipe], _as_rounded(grad)
    to_input, to_weight = products.grad_input, products.grad_weight
    left = quantize(rounded, to_input.left)
    gradients = []
    if needs_input:
        right = quantize(weight.mT, to_input.right)
        gradients.append(_multiply(to_input, left, right, input_dtype, backend))
    if needs_weight and to_weight is None:
        with torch.autocast(grad.device.type, enabled=False):
            gradients.append(torch.matmul(grad.mT, saved[0].to(grad.dtype)).to(weight.dtype))
    elif needs_weight and to_weight is not None:
        same = to_weight.left == to_input.left and to_weight.left.scaling == "tensor"
        left = _turned(left) if same else quantize(rounded.mT, to_weight.left)
        right = saved[0].view(DTYPES[to_weight.right.format]), saved[1]
        gradients.append(_multiply(to_weight, left, right, weight.dtype, backend))
    return tuple(gradients)


Products = Callable[..., tuple[torch.Tensor, ...]]


def _opaque(name: str, compute: Products, options: str) -> Callable[..., list[torch.Tensor]]:
    """Emulated products as an operator of their own, which compilers call and do not look into.

    Emulation is casts, decodings and a product of FP32 matrices. Traced, it would take twice as long to compile as the
    product alone, and be one more place where a compiler could leave out a rounding.
    """

    def run(operands: Any, *args: Any) -> list[torch.Tensor]:
        # A compiler must know how results lie in memory, and blocks of an ensemble lie otherwise than the whole.
        return [each.contiguous() for each in compute(tuple(operands), *args)]

    schema = f"(Tensor[] operands, str recipe, str backend{options}) -> Tensor[]"
    operator = torch.library.custom_op(f"fp8rl_torchrl::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(run)
    return operator


_BLOCK = 2**18
"""Elements of an operand that a CPU casts at once: 1 MiB in FP32, which stays in its cache."""


def _in_blocks(compute: Products, operands: tuple[torch.Tensor, ...], *options: Any) -> tuple[torch.Tensor, ...]:
    """Compute for a whole ensemble at once; eagerly on a CPU, for as many members at a time as its cache holds.

    Casting and decoding make a dozen passes over each operand. Past the cache, and past what the allocator keeps,
    an ensemble of large layers would take up to three times as long as the layers one by one.
    """
    members = max(each.shape[0] if each.dim() == 3 else 1 for each in operands)
    step = max(1, _BLOCK // max(1, *(each.shape[-2:].numel() for each in operands)))
    if step >= members or _is_traced() or operands[0].device.type != "cpu" or any(each.dim() > 3 for each in operands):
        return compute(operands, *options)
    blocks = [slice(first, first + step) for first in range(0, members, step)]
    parts = [compute(tuple(e[block] if e.dim() == 3 else e for e in operands), *options) for block in blocks]
    # What does not depend on the member is the same in each block.
    return tuple(torch.cat(each) if each[0].dim() == 3 else each[0] for each in zip(*parts, strict=True))


_opaque_output = _opaque("emulated_output", functools.partial(_in_blocks, _output), "")
_opaque_gradients = _opaque(
    "emulated_gradients",
    functools.partial(_in_blocks, _gradients),
    ", bool needs_input, bool needs_weight, ScalarType dtype",
)


def _compute(compute: Products, opaque: Any, operands: tuple[torch.Tensor, ...], recipe: str, backend: str, *rest: Any):
    """Native products are traced where a compiler looks on, so that it fuses their casts; emulated ones are not."""
    if _is_traced() and choose_backend(operands[0].device, backend) == "emulated":
        return tuple(opaque(list(operands), recipe, backend, *rest))
    return _in_blocks(compute, operands, recipe, backend, *rest)


class _Forward(torch.autograd.Function):
    """The product ``output``; keeps the input as the product ``grad_weight`` will read it.

    Leading dimensions of input ``[..., M, K]`` and weight ``[..., N, K]`` are broadcast; they come from ``vmap``.
    """

    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, recipe: str, backend: str) -> tuple[torch.Tensor, ...]:
        return _compute(_output, _opaque_output, (input, weight), recipe, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        input, weight, ctx.recipe, ctx.backend = inputs
        # Not the scale: through it what is saved depends on the input, so that a second derivative finds `_Backward`.
        ctx.mark_non_differentiable(*output[1:2])
        ctx.save_for_backward(weight, *(output[1:] or (input,)))
        ctx.input_shape, ctx.input_dtype = input.shape, input.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[:2])
        gradients: Any = _Backward.apply(grad, weight, ctx.recipe, ctx.backend, *needed, ctx.input_dtype, *saved)
        # Where one operand served a whole ensemble, its gradient is the sum.
        shapes = [shape for shape, wanted in zip((ctx.input_shape, weight.shape), needed, strict=True) if wanted]
        sums = iter([gradient.sum_to_size(shape) for gradient, shape in zip(gradients, shapes, strict=True)])
        return (*(next(sums) if wanted else None for wanted in needed), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        outputs: Any = _Forward.apply(*_batch_dims_first(in_dims, inputs))
        return outputs, (0, *([None if in_dims[0] is None else 0] * (len(outputs) - 1)))


class _Backward(torch.autograd.Function):
    """The products ``grad_input`` and ``grad_weight``, those of them that are needed.

    A function of its own, so that a second derivative raises, also under `torch.func`, where
    ``once_differentiable`` lets it pass as zero.
    """

    @staticmethod
    def forward(
        grad: torch.Tensor,
        weight: torch.Tensor,
        recipe: str,
        backend: str,
        needs_input: bool,
        needs_weight: bool,
        input_dtype: torch.dtype,
        *saved: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        operands = grad, weight, *saved
        options = needs_input, needs_weight, input_dtype
        return _compute(_gradients, _opaque_gradients, operands, recipe, backend, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "a Float8Linear cannot be differentiated twice: the derivative of rounding to FP8 is zero almost "
            "everywhere. Leave layers under a second derivative in high precision (convert's skip=)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        gradients: Any = _Backward.apply(*_batch_dims_first(in_dims, inputs))
        needed = inputs[4:6]
        grad, weight, saved = (in_dims[place] is not None for place in (0, 1, 7))
        batched = [each for each, wanted in zip((grad or weight, grad or saved), needed, strict=True) if wanted]
        return gradients, tuple(0 if each else None for each in batched)


def _batch_dims_first(in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Move the dimension that ``vmap`` maps to the front, clear of the leading dimensions of inner ``vmap``s."""
    ranks = [each.dim() - (dim is not None) for each, dim in zip(inputs, in_dims, strict=True) if torch.is_tensor(each)]
    moved = []
    for each, dim in zip(inputs, in_dims, strict=True):
        if dim is not None:
            each = each.movedim(dim, 0)
            for _ in range(max(ranks) - (each.dim() - 1)):
                each = each.unsqueeze(1)
        moved.append(each)
    return moved


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For each weight that a rollout or a target network used, by cast: its bits at that time, and its codes."""


def _keeps_codes(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the codes of a weight can be kept: a plain tensor in eager mode, whose contents can be compared.

    A version counter would miss what TorchRL's target updaters and weight updates write, through ``.data``. Comparing
    the contents on a GPU would make the host wait, so there each call casts the weight anew, as compiled code does.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not any(
            torch._C._functorch.is_functorch_wrapped_tensor(each)  # pyright: ignore[reportAttributeAccessIssue]
            for each in (input, weight)
        )
    )


def _kept_codes(weight: torch.Tensor, cast: Cast) -> Quantized:
    bits = weight.detach().view(torch.int32)
    kept: Any = _kept.setdefault(weight, {})
    if cast in kept:
        before, quantized = kept[cast]
        if before.shape == bits.shape and not torch.count_nonzero(before ^ bits):
            return quantized
    quantized = quantize(weight, cast)
    kept[cast] = bits.clone(), quantized
    return quantized
