"""`quantization_error` leaves no trace in what it measures, and refuses what it cannot."""

import copy

import pytest
import torch
from float8_layers import bf16, make, network, normal, plain
from torch import func, nn

from fp8rl_torchrl.precision.error import quantization_error

M, K, N = 64, 64, 48


# --- no trace ---


class Restless(nn.Module):
    """With all that a run could change."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(K), nn.Dropout(0.5), nn.ReLU(inplace=True), make(K, N))
        self.head = make(N, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x)) + torch.randn(16)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode, bf16])
def test_nothing_is_changed(context):
    module, x = Restless(), normal(M, K).requires_grad_()
    module(x).sum().backward()
    module.head.weight.requires_grad_(False)
    state, grads = copy.deepcopy(module.state_dict()), [p.grad.clone() for p in module.parameters()]
    versions, attributes = [p._version for p in module.parameters()], [set(vars(m)) for m in module.modules()]
    before, x_grad, random = x.detach().clone(), x.grad.clone(), torch.get_rng_state()
    with context():
        report = quantization_error(module, x)
        assert quantization_error(module, x) == report, "both draw the same random numbers"
    assert report.module.output.relative_error < 0.1, "so do FP8 and its twin"
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), grads, strict=True))
    assert [p._version for p in module.parameters()] == versions
    assert [set(vars(m)) for m in module.modules()] == attributes
    assert not module.head.weight.requires_grad
    assert torch.equal(x, before)
    assert torch.equal(x.grad, x_grad)
    assert module.training


def test_nothing_is_left_behind_when_the_module_fails():
    module = network()
    with pytest.raises(ValueError, match="expects input"):
        quantization_error(module, normal(M, K + 1))
    assert all("forward" not in vars(layer) for layer in module.modules())
    layer = make()
    layer.forward = replaced = lambda input: input
    quantization_error(nn.Sequential(layer), normal(M, 64))
    assert layer.forward is replaced


@pytest.mark.slow
def test_a_compiled_module_is_measured_as_it_is_written():
    module, x = network(), normal(M, K)
    expected = quantization_error(module, x)
    assert quantization_error(torch.compile(module), x).module == expected.module


# --- refusals ---


def test_a_module_without_fp8_is_refused():
    with pytest.raises(ValueError, match="Sequential holds no Float8Linear, so there is no FP8 to measure"):
        quantization_error(plain(network()), normal(M, K))


def test_a_module_that_does_not_run_its_layers_is_refused():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fp8, self.used = make(), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match="none of the 1 Float8Linear layers ran on this input"):
        quantization_error(Idle(), torch.ones(2, 4))


def test_outputs_without_a_gradient_are_refused():
    class Greedy(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    with pytest.raises(ValueError, match="Greedy returned no floating-point tensor that could be differentiated"):
        quantization_error(Greedy(*network()), normal(M, K))


@pytest.mark.parametrize("wrong", [torch.ones(M, 5), torch.ones(4), [torch.ones(M, 4)] * 2, []])
def test_an_output_grad_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"output_grad needs one tensor for each output, of shapes \[\[64, 4\]\]; got"):
        quantization_error(network(), normal(M, K), output_grad=wrong)


def test_an_ensemble_under_vmap_is_refused():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(K, N)

        def forward(self, x):
            return func.vmap(self.layer)(x)

    with pytest.raises(RuntimeError, match="layer runs under vmap; measure one member of the ensemble by itself"):
        quantization_error(Ensemble(), normal(3, M, K))
