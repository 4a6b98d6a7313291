"""Changes of weights worked out by hand."""

import pytest
import torch
from torch import nn

from fp8rl_torchrl.numerics.survival import watched
from fp8rl_torchrl.training.flat import FlatParameter


def stored_in_bf16(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.copy_(parameter.data.bfloat16())


def survival(weights, gradients, lr, low=True):
    weight = nn.Parameter(torch.tensor(weights))
    optimizer = torch.optim.SGD([weight], lr=lr, fused=True)
    if low:
        optimizer.register_step_post_hook(stored_in_bf16)
    weight.grad = torch.tensor(gradients)
    with watched([optimizer], {weight.data_ptr(): "layer"}) as survived:
        optimizer.step()
    return survived["layer"].survival.item()


# BF16 numbers are 2^-8 apart below 1.
@pytest.mark.parametrize(
    ("weights", "gradients", "lr", "expected"),
    [
        ([1.0], [1.0], 2.0**-8, 1.0),  # to the next number
        ([1.0], [1.0], 2.0**-10, 0.0),  # a quarter of the way: back to 1
        ([1.0, 0.0], [1.0, 1.0], 2.0**-10, 0.5),  # lost, and whole
        ([1.0], [1.0], 3 * 2.0**-10, 4 / 3),  # three quarters of the way: rounded up
    ],
)
def test_what_survives_in_bf16(weights, gradients, lr, expected):
    assert survival(weights, gradients, lr) == pytest.approx(expected)
    assert survival(weights, gradients, lr, low=False) == pytest.approx(1.0)


# FP32 numbers are 2^-23 apart above 1.
@pytest.mark.parametrize(("weights", "expected"), [([1.0], 0.0), ([1.0, 0.0], 0.5), ([0.0], 1.0)])
def test_a_change_too_small_for_fp32_is_told_from_one_too_small_for_bf16(weights, expected):
    weight = nn.Parameter(torch.tensor(weights))
    optimizer = torch.optim.SGD([weight], lr=2.0**-30, fused=True)
    weight.grad = -torch.ones_like(weight)
    with watched([optimizer], {weight.data_ptr(): "layer"}) as survived:
        optimizer.step()
    assert survived["layer"].survival_in_fp32.item() == pytest.approx(expected)
    assert survived["layer"].survival.item() == pytest.approx(expected)


def test_what_bf16_loses_would_survive_in_fp32():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=2.0**-10, fused=True)
    optimizer.register_step_post_hook(stored_in_bf16)
    weight.grad = torch.ones(1)
    with watched([optimizer], {weight.data_ptr(): "layer"}) as survived:
        optimizer.step()
    assert (survived["layer"].survival.item(), survived["layer"].survival_in_fp32.item()) == (0.0, 1.0)


def test_moments_that_fp32_would_lose_too_are_not_counted():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.tensor([1e-30, 1.0])
    with watched([optimizer], {weight.data_ptr(): "layer"}) as survived:
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"][0] == 0
    assert optimizer.state[weight]["exp_avg"][0] != 0
    assert survived["layer"].lost_moments.item() == 0.0


def test_a_step_that_intends_nothing_is_nan():
    assert survival([1.0], [0.0], 0.1) != survival([1.0], [0.0], 0.1)


def test_nothing_survives_of_a_skipped_step():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], fused=True)
    optimizer.found_inf = torch.ones(())
    weight.grad = torch.tensor([1.0, float("inf")])
    with watched([optimizer], {weight.data_ptr(): "layer"}) as survived:
        optimizer.step()
    assert survived["layer"].survival.item() == 0.0
    assert torch.equal(weight, torch.ones(2))


def test_layers_are_found_in_a_flat_parameter():
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    flat = FlatParameter([*first.parameters(), *second.parameters()])
    optimizer = torch.optim.Adam([flat], lr=0.1, fused=True)
    names = {first.weight.data_ptr(): "first", second.weight.data_ptr(): "second"}

    def forget_the_second(optimizer, args, kwargs):
        second.weight.data.copy_(before)

    before = second.weight.detach().clone()
    optimizer.register_step_post_hook(forget_the_second)
    flat.grad = torch.ones_like(flat)
    with watched([optimizer], names) as survived:
        optimizer.step()
    assert {name: each.survival.item() for name, each in survived.items()} == pytest.approx(
        {"first": 1.0, "second": 0.0}, abs=1e-6
    )


def test_the_state_of_the_optimizer_is_left_alone():
    found = []
    for watch in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        for _ in range(3):
            weight.grad = torch.randn(5)
            with watched([optimizer] if watch else [], {weight.data_ptr(): "layer"}):
                optimizer.step()
        found.append([weight.detach(), *optimizer.state[weight].values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# 0.001 times the square of a gradient of 2^-8 is 1.5e-8, a quarter of FP16's smallest number; of 1, it is 0.001.
@pytest.mark.parametrize(("stored", "expected"), [(torch.float16, 0.25), (torch.float32, 0.0)])
def test_second_moments_that_vanish_are_counted(stored, expected):
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight], fused=True)

    def store(optimizer, args, kwargs):
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[weight]
            state[moment].copy_(state[moment].to(stored))

    optimizer.register_step_post_hook(store)
    weight.grad = torch.tensor([1.0, 2.0**-8, 0.0, 1.0])  # where none was given, none is lost
    with watched([optimizer], {weight.data_ptr(): "layer"}) as survived:
        optimizer.step()
    assert survived["layer"].lost_moments.item() == expected
