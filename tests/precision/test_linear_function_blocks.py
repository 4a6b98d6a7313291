"""Ensembles of large layers, which a CPU computes some members at a time: the same bits as all at once."""

import pytest
import torch
from float8_layers import every_recipe
from torch.func import functional_call, stack_module_state

from fp8rl_torchrl.precision import linear_function
from fp8rl_torchrl.precision.linear import Float8Linear

E, M, K, N = 5, 24, 32, 48


def ensemble(recipe, shared_input):
    """Output and gradients of an ensemble, and how many members each forward pass took at a time."""
    torch.manual_seed(0)
    layers = [Float8Linear(K, N, recipe=recipe) for _ in range(E)]
    parameters, _ = stack_module_state(layers)
    x = torch.randn(*([] if shared_input else [E]), M, K, requires_grad=True)
    call = torch.vmap(lambda p, x: functional_call(layers[0], p, (x,)), in_dims=(0, None if shared_input else 0))
    output = call(parameters, x)
    return output, *torch.autograd.grad(output, (x, *parameters.values()), torch.randn(E, M, N))


@every_recipe
@pytest.mark.parametrize("shared_input", [False, True])
@pytest.mark.parametrize(("block", "sizes"), [(2 * N * K, [2, 2, 1]), (1, [1] * 5), (E * N * K, [5])])
def test_blocks_give_the_bits_of_the_whole(monkeypatch, recipe, shared_input, block, sizes):
    whole = ensemble(recipe, shared_input)
    seen = []
    output = linear_function._output

    def watched(operands, *options):
        seen.append(operands[1].shape[0])
        return output(operands, *options)

    monkeypatch.setattr(linear_function, "_output", watched)
    monkeypatch.setattr(linear_function, "_BLOCK", block)
    in_blocks = ensemble(recipe, shared_input)
    assert seen == sizes
    assert all(torch.equal(*pair) for pair in zip(whole, in_blocks, strict=True))


def test_a_block_that_is_left_out_would_be_found(monkeypatch):
    whole = ensemble("rowwise", False)
    output = linear_function._output
    monkeypatch.setattr(linear_function, "_BLOCK", 1)
    first = iter([True])
    monkeypatch.setattr(
        linear_function,
        "_output",
        lambda operands, *options: (
            tuple(each * 0 for each in output(operands, *options)) if next(first, False) else output(operands, *options)
        ),
    )
    assert not torch.equal(whole[0], ensemble("rowwise", False)[0])


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "rowwise-gw-hp"])
@pytest.mark.parametrize("members", [(), (3,), (10,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compilers_are_told_how_the_results_of_the_operators_lie_in_memory(recipe, members, dtype):
    # Ten members are computed in several blocks (128 × 1024 elements each), which a compiler's fake run is not.
    torch.manual_seed(0)
    shared = torch.randn(256, 1024, dtype=dtype)
    weight = torch.randn(*members, 112, 1024)
    operators = torch.ops.fp8rl_torchrl
    checks = ("test_schema", "test_faketensor")
    for input in {shared, shared.expand(*members, *shared.shape).contiguous()}:
        torch.library.opcheck(operators.emulated_output, ([input, weight], recipe, "emulated"), test_utils=checks)
        output, *saved = operators.emulated_output([input, weight], recipe, "emulated")
        operands = [torch.randn_like(output), weight, *(saved or [input])]
        options = (recipe, "emulated", True, True, dtype)
        torch.library.opcheck(operators.emulated_gradients, (operands, *options), test_utils=checks)
