"""The layer that is measured: what it saves for backward, and what it multiplies."""

import pytest
import torch
from layers import Layer, device_name, device_of

CPU = torch.device("cpu")
W, B = 64, 32


@pytest.mark.parametrize(
    ("mode", "saved"),
    [
        ("fp32", 4 * B * W),  # the input
        ("bf16", 2 * B * W + 2 * W * W),  # and the weight's BF16 copy
        ("fp8-rowwise", B * W + 4 * W),  # codes, and a scale for each of the input's columns
        ("fp8-tensorwise", B * W + 4),  # codes, and one scale
        ("fp8-rowwise-gw-hp", 2 * B * W),  # the input, in BF16
    ],
)
def test_bytes_saved_for_backward(mode, saved):
    assert Layer(mode, W, B, CPU).saved_bytes() == saved


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp8-rowwise"])
def test_a_step_computes_every_gradient(mode, monkeypatch):
    layer, asked = Layer(mode, W, B, CPU), []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: asked.append(grad(*args)))
    layer.step()
    (gradients,) = asked
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    assert [(each.shape, each.dtype) for each in gradients] == [
        ((B, W), dtype),
        ((W, W), torch.float32),
        ((W,), torch.float32),
    ]
    assert all(each.any() for each in gradients)


def test_the_same_numbers_in_every_mode_and_others_for_another_seed():
    layers = [Layer("fp32", W, B, CPU), Layer("fp8-rowwise", W, B, CPU), Layer("fp32", W, B, CPU, seed=1)]
    same, other = (torch.equal(layers[0].module.weight, layer.module.weight) for layer in layers[1:])
    assert same
    assert not other
    assert torch.equal(layers[0].input.bfloat16(), layers[1].input)


def test_what_multiplies_in_words(monkeypatch):
    assert set(Layer("bf16", W, B, CPU).products().values()) == {"bf16"}
    assert set(Layer("fp8-rowwise", W, B, CPU).products().values()) == {"emulated"}
    high = Layer("fp8-rowwise-gw-hp", W, B, CPU)
    assert high.products() == {"output": "emulated", "grad_input": "emulated", "grad_weight": "bf16"}
    native = Layer("fp8-rowwise", W, B, CPU)
    native.module.backend = "native"
    assert native.products() == {
        "output": "rowwise kernel, BF16",
        "grad_input": "rowwise kernel, BF16",
        "grad_weight": "tensorwise kernel, FP32, scales after",
    }


def test_devices():
    environment = {"hardware": {"cpu": "a CPU", "gpus": ["a GPU", "another"]}}
    assert device_of("cpu") == CPU
    assert device_name(CPU, environment) == "a CPU, one core"
    assert device_name(torch.device("cuda"), environment) == "a GPU"
    assert device_name(torch.device("cuda:1"), environment) == "another"
    with pytest.raises(RuntimeError, match="no device 'cuda:99' here"):
        device_of("cuda:99")
