"""`quantization_error`: its numbers against numbers worked out by hand, and that it leaves no trace."""

import copy
import dataclasses
import math

import pytest
import torch
from float8_layers import (
    bf16,
    by_the_textbook,
    every_recipe,
    forward_and_backward,
    in_high_precision,
    make,
    network,
    normal,
    plain,
    relative,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from fp8rl_torchrl.precision.error import ErrorReport, ModuleError, TensorError, quantization_error
from fp8rl_torchrl.precision.linear import Float8Linear

M, K, N = 64, 64, 48


# --- the two measures ---


@pytest.mark.parametrize(("error", "db"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (0.5, 6.0206), (10.0, -20.0)])
def test_decibels(error, db):
    assert TensorError(error).sqnr_db == pytest.approx(db, abs=1e-4)


def test_no_error_and_nothing_but_error():
    assert TensorError(0.0).sqnr_db == math.inf
    assert TensorError(math.inf).sqnr_db == -math.inf
    assert math.isnan(TensorError(math.nan).sqnr_db)


def test_relative_error_by_hand():
    reference = torch.tensor([3.0, 4.0])  # of norm 5
    assert TensorError.of([reference + torch.tensor([0.3, 0.4])], [reference]).relative_error == pytest.approx(0.1)
    assert TensorError.of([reference], [reference]) == TensorError(0.0)
    assert TensorError.of([reference * 0], [reference]) == TensorError(1.0)
    assert TensorError.of([torch.zeros(2)], [torch.zeros(2)]) == TensorError(0.0)
    assert TensorError.of([reference], [torch.zeros(2)]) == TensorError(math.inf)
    assert math.isnan(TensorError.of([reference * math.nan], [reference]).relative_error)
    # Several tensors are one: sqrt(0.3² + 0.4²) / sqrt(3² + 4²), not the mean of two errors of 0.1 and 0.
    values, references = [torch.tensor([3.3]), torch.tensor([[4.0]])], [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert TensorError.of(values, references).relative_error == pytest.approx(0.3 / 5)


def test_large_and_small_numbers_do_not_overflow():
    huge = torch.tensor([3e38, 1e38])
    assert TensorError.of([huge * 0.5], [huge]).relative_error == pytest.approx(0.5)
    tiny = torch.tensor([1e-38])
    assert TensorError.of([tiny * 0.5], [tiny]).relative_error == pytest.approx(0.5, rel=1e-3)


# --- one layer ---


def test_a_layer_of_known_error():
    # Each row's largest is 1.75, so its scale is 256: 1.0625 * 256 = 272 lies midway between the codes 256 and 288 and
    # becomes the even one, 256. The output is off by 0.0625 in 1.0625.
    layer = Float8Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
    x, g = torch.tensor([[1.0625, 1.75]]), torch.tensor([[1.0]])
    row = quantization_error(layer, x, output_grad=g).layers[0]
    assert row.output.relative_error == pytest.approx(0.0625 / 1.0625)
    assert row.output.sqnr_db == pytest.approx(20 * math.log10(17))
    assert row.input_grad == TensorError(0.0)
    # Along M there is one row, so that each of its scales brings its own number to a code: 1.0625 * 256 = 272 again,
    # and 1.75 exactly.
    assert row.weight_grad.relative_error == pytest.approx(0.0625 / math.hypot(1.0625, 1.75))


def test_what_fp8_holds_exactly_has_no_error():
    layer = Float8Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.3)
    report = quantization_error(layer, torch.tensor([[0.5, 4.0]]), output_grad=torch.tensor([[2.0]]))
    for row in (report.module, *report.layers, *report.accumulated):
        for error in (row.output, row.input_grad, row.weight_grad):
            assert error == TensorError(0.0)
            assert error.sqnr_db == math.inf


@every_recipe
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_one_layer_against_the_textbook(recipe, name):
    layer, x, g = make(K, N, recipe, bias=False), normal(M, K), normal(M, N, seed=2)
    if name == "bf16":
        with bf16():
            report = quantization_error(layer, x, output_grad=g)
            y = layer(x)
        assert y.dtype == torch.bfloat16
        x, g, rel = x.bfloat16(), g.bfloat16(), 0.02
    else:
        report, rel = quantization_error(layer, x, output_grad=g), 1e-4
    w = layer.weight.detach()
    expected = [
        relative(*pair) for pair in zip(by_the_textbook(recipe, x, w, g), in_high_precision(layer, x, g), strict=True)
    ]
    for row in (report.layers[0], report.accumulated[0], report.module):
        found = [row.output, row.input_grad, row.weight_grad]
        assert [each.relative_error for each in found] == pytest.approx(expected, rel=rel, abs=4e-3 * (name == "bf16"))


# --- several layers ---


@every_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_local_and_accumulated_errors_of_a_network(recipe, autocast):
    module, x, g = network(recipe), normal(M, K), normal(M, 4, seed=2)
    context = bf16 if autocast else torch.enable_grad
    with context():
        report = quantization_error(module, x, output_grad=g)

    def run(module):
        """By ordinary means: gradients of each layer's input and output, and of the parameters."""
        seen = {}
        for name in ("0", "2"):
            module.get_submodule(name).register_full_backward_hook(
                lambda layer, grad_input, grad_output, name=name: seen.update({name: (grad_input[0], grad_output[0])})
            )
        module[1] = nn.ReLU()  # backward hooks do not go with what is done in place
        leaf, outputs = x.clone().requires_grad_(), []
        with context():
            output = leaf
            for layer in module:
                output = layer(output)
                outputs.append(output.detach())
        output.backward(g.to(output.dtype))
        return seen, outputs, leaf.grad, [p.grad for p in module.parameters()]

    module.zero_grad()
    ours, theirs = run(copy.deepcopy(module)), run(plain(module))
    assert [row.name for row in report.layers] == [row.name for row in report.accumulated] == ["0", "2"]
    for row, index, of_weight in zip(report.accumulated, (0, 2), (0, 2), strict=True):
        pairs = [(ours[1][index], theirs[1][index])]
        pairs += [(ours[0][row.name][0], theirs[0][row.name][0]), (ours[3][of_weight], theirs[3][of_weight])]
        found = (row.output, row.input_grad, row.weight_grad)
        assert [each.relative_error for each in found] == pytest.approx([relative(*p) for p in pairs], rel=1e-4)
    flat = [torch.cat([each.flatten() for each in grads]) for grads in (ours[3], theirs[3])]
    expected = [relative(ours[1][-1], theirs[1][-1]), relative(ours[2], theirs[2]), relative(*flat)]
    found = (report.module.output, report.module.input_grad, report.module.weight_grad)
    assert [each.relative_error for each in found] == pytest.approx(expected, rel=1e-4)

    # A layer's own error: alone, on what it received.
    for row, inputs in zip(report.layers, (x, ours[1][1]), strict=True):
        layer, grad = module.get_submodule(row.name), ours[0][row.name][1]
        with context():
            pair = [forward_and_backward(each, inputs, grad) for each in (layer, plain(layer))]
        found = [each.relative_error for each in (row.output, row.input_grad, row.weight_grad)]
        assert found == pytest.approx([relative(*each) for each in zip(*pair, strict=True)], rel=1e-4, abs=1e-9)
    assert report.layers[1].output.relative_error < report.accumulated[1].output.relative_error


def test_the_twin_under_autocast_is_a_bf16_module():
    module, x = network(), normal(M, K)
    with bf16(), torch.no_grad():
        ours, theirs = module(x), plain(module)(x)
        report = quantization_error(module, x)
    assert theirs.dtype == torch.bfloat16
    assert report.module.output.relative_error == pytest.approx(relative(ours, theirs))
    assert report.module.output != quantization_error(module, x).module.output


def test_a_layer_that_runs_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = make(K, K, bias=False), make(16, 16)

        def forward(self, x, y):
            return self.layer(x), self.layer(y)

    module, x, y = Twice(), normal(M, K), 100 * normal(M, K, seed=3)
    g = normal(M, K, seed=2)
    report = quantization_error(module, x, y, output_grad=(g, g))
    assert [row.name for row in report.layers] == ["layer"]
    both = torch.cat([x, y])
    w = module.layer.weight.detach().double()
    with torch.no_grad():
        expected = relative(module.layer(both), both.double() @ w.T)
    assert report.layers[0].output.relative_error == pytest.approx(expected, rel=1e-4)
    assert report.module.output.relative_error == pytest.approx(expected, rel=1e-4)
    # An optimizer gets the sum of both calls' gradients.
    grads = [forward_and_backward(module.layer, each, g)[2] for each in (x, y)]
    assert report.accumulated[0].weight_grad.relative_error == pytest.approx(
        relative(sum(grads), g.double().T @ (x + y).double()), rel=1e-4
    )


def test_gradients_start_from_what_is_given():
    module, x = network(), normal(M, K)
    first, second = quantization_error(module, x), quantization_error(module, x)
    assert first == second, "the same at every call"
    other = quantization_error(module, x, output_grad=normal(M, 4, seed=9))
    assert other.module.output == first.module.output
    assert other.module.weight_grad != first.module.weight_grad


# --- what modules take and return ---


def test_tensordicts_tuples_and_dicts():
    module, x, g = network(), normal(M, K), normal(M, 4, seed=2)
    expected = quantization_error(module, x, output_grad=g)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, batch):
            y = self.inner(batch["observation"])
            return {"y": y, "count": torch.tensor(3), "observation": batch["observation"], "constant": torch.ones(2)}

    data = TensorDict({"observation": x, "done": torch.zeros(M, dtype=torch.bool)}, [M])
    in_tensordict = quantization_error(TensorDictModule(module, ["observation"], ["y"]), data, output_grad=g)
    in_dict = quantization_error(Wrapped(), {"observation": x}, output_grad=[g])
    for report in (in_tensordict, in_dict):
        assert report.module == expected.module, "what is passed through or constant is no output"
        assert [row.output for row in report.layers] == [row.output for row in expected.layers]
    assert set(data.keys()) == {"observation", "done"}
    assert torch.equal(data["observation"], x)


def test_where_there_is_no_gradient_there_is_no_number():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer, self.frozen = nn.Embedding(10, K), make(K, N), make(N, N)

        def forward(self, index):
            y = self.layer(self.embedding(index))
            with torch.no_grad():
                offset = self.frozen(y)
            return y + offset

    report = quantization_error(Indexed(), torch.arange(8))
    assert report.module.input_grad is None
    layer, frozen = report.layers
    assert 0.03 < layer.input_grad.relative_error < 0.045
    assert 0.03 < frozen.output.relative_error < 0.045
    assert frozen.input_grad is frozen.weight_grad is None
    assert [row.weight_grad for row in report.accumulated][1] is None
    assert "-" in str(report)


# --- as a value, and printed ---


def test_an_immutable_value():
    report = quantization_error(network(), normal(M, K))
    for value, field in ((report, "module"), (report.module, "output"), (report.module.output, "relative_error")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)


def test_printed_it_is_a_table():
    def row(name, *errors):
        return ModuleError(name, *(None if error is None else TensorError(error) for error in errors))

    report = ErrorReport(
        layers=(row("encoder.0", 0.1, 0.01, 0.0), row("encoder.2", 0.036, 0.036, None)),
        accumulated=(row("encoder.0", 0.1, 0.5, 1.0), row("encoder.2", 0.04, 0.05, 0.06)),
        module=row("", 0.05, None, 12.0),
    )
    assert str(report).split("\n") == [
        "                      output      input grad     weight grad",
        "                error     dB    error     dB    error     dB",
        "own error",
        "  encoder.0    0.1000   20.0   0.0100   40.0   0.0000    inf",
        "  encoder.2    0.0360   28.9   0.0360   28.9               -",
        "accumulated",
        "  encoder.0    0.1000   20.0   0.5000    6.0   1.0000   -0.0",
        "  encoder.2    0.0400   28.0   0.0500   26.0   0.0600   24.4",
        "whole module   0.0500   26.0               -  12.0000  -21.6",
    ]
