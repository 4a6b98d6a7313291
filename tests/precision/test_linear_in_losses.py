"""`Float8Linear` inside TorchRL's losses: gradients against FP32's, on the same parameters, batch and random stream.

How far they may be apart is derived: products in FP8 have independent relative errors, so along a path through P of
them they add up to √(Σ error²), and twice that is allowed, since few numbers (a bias) average less.
"""

import math
from collections import Counter

import pytest
import torch
from float8_layers import base, every_recipe, relative, watch
from torchrl.objectives import SoftUpdate
from torchrl_losses import ACTIONS, ACTOR, BATCH, CRITIC, LOSSES, OBSERVATION, batch_for, build, gradients

from fp8rl_torchrl.precision import linear_function, quantize
from fp8rl_torchrl.precision.linear import Float8Linear

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
ROWS = BATCH[0] * BATCH[1]
every_loss = pytest.mark.parametrize("name", LOSSES)

ERRORS = {"rowwise": (0.037, 0.038, 0.037), "tensorwise": (0.037, 0.059, 0.059), "rowwise-gw-hp": (0.037, 0.038, 0)}
"""Relative errors of one layer's products: output, input gradient, weight gradient.

An operand in e4m3 has .026, in e5m2 .053.
"""

PRODUCTS = {False: (6, 2, 1), True: (6, 5, 1)}
"""How many products there are at most on the path of a gradient, with three FP8 layers a network: six outputs (the
network's, and those of its target, critic or advantage), and the way back to its first layer, for a policy that learns
through a critic also through that critic."""

PASSES = {
    # forward passes of the actor, and of the critic: all members of an ensemble in one
    "a2c": (1, 2),  # the critic in GAE, for both observations at once, and in the loss
    "ppo": (1, 2),
    "reinforce": (1, 2),
    "dqn": (2, 0),  # the network and its target
    "sac": (2, 3),  # the actor on both observations; the critic for the actor, for the target and for its own loss
    "td3": (2, 3),
    "redq": (1, 1),  # TorchRL batches all of them
}


def through_a_critic(name):
    return name in ("sac", "td3", "redq")


def bound(name, recipe):
    counts = PRODUCTS[through_a_critic(name)]
    return 2 * math.sqrt(sum(count * error**2 for count, error in zip(counts, ERRORS[recipe], strict=True)))


def layers(name):
    """``(K, N)`` of the layers that should be FP8, of the actor and of the critic."""
    observed = OBSERVATION + (ACTIONS if through_a_critic(name) else 0)
    actor, critic = zip((OBSERVATION, *ACTOR), ACTOR, strict=False), zip((observed, *CRITIC), CRITIC, strict=False)
    return list(actor), list(critic) if name != "dqn" else []


def products_expected(name, recipe):
    """How often each product of each layer runs: ``((K, N), product, format of the left operand)``."""
    expected = Counter()
    gradient = "e5m2" if recipe == "tensorwise" else "e4m3"
    for network, passes, critic in zip(layers(name), PASSES[name], (False, True), strict=True):
        # SAC and TD3 differentiate the critic twice: for itself, and for the actor, there without its weights.
        to_actor = critic and through_a_critic(name)
        backward = 2 if to_actor and name != "redq" else 1
        for place, layer in enumerate(network):
            expected[layer, "output", "e4m3"] = passes
            expected[layer, "grad_input", gradient] = backward if place else int(to_actor)
            expected[layer, "grad_weight", gradient] = int(recipe != "rowwise-gw-hp")
    return expected


def products_seen(watched):
    seen = Counter()
    for (left, right), (format, _) in zip(watched, watched.formats, strict=True):
        if left.shape[-1] == ROWS:
            seen[(right.shape[-2], left.shape[-2]), "grad_weight", format] += 1
        elif left.shape[-1] < right.shape[-2]:
            seen[(left.shape[-1], right.shape[-2]), "output", format] += 1
        else:
            seen[(right.shape[-2], left.shape[-1]), "grad_input", format] += 1
    return seen


@pytest.fixture(scope="module")
def reference():
    """The gradients of each loss with plain layers, in FP32."""
    return {name: gradients(build(name), batch_for(name)) for name in LOSSES}


def errors(found, expected):
    assert found.keys() == expected.keys()
    return {key: relative(found[key], expected[key]) for key in expected}


# --- gradients ---


@every_loss
@every_recipe
@pytest.mark.parametrize("autocast", ["fp32", "bf16"])
def test_gradients_are_within_the_quantization_error_of_fp32(name, recipe, autocast, reference, monkeypatch):
    watched = watch(monkeypatch)
    with base(autocast):
        found = gradients(build(name, recipe), batch_for(name))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())
    apart = errors(found, reference[name])
    assert max(apart.values()) <= bound(name, recipe)
    # FP8 it was: BF16 alone would be ten times closer. And every product of every layer, each the expected times.
    assert max(apart.values()) > 0.03
    assert products_seen(watched) == products_expected(name, recipe)


@every_loss
@every_recipe
def test_layers_may_be_swapped_after_the_loss_was_built(name, recipe):
    before, after = (gradients(build(name, recipe, swap), batch_for(name)) for swap in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@every_loss
def test_plain_and_fp8_losses_share_names_and_values_of_parameters(name):
    plain, fp8 = build(name).state_dict(), build(name, "rowwise").state_dict()
    assert list(plain) == list(fp8)
    assert all(torch.equal(plain[key], fp8[key]) for key in plain)


# --- the same checks on what is wrong ---


@every_loss
def test_an_unscaled_cast_breaks_the_bound(name, reference, monkeypatch):
    monkeypatch.setattr(quantize, "scale_for", lambda amax, *_: torch.ones_like(amax))
    apart = errors(gradients(build(name, "rowwise"), batch_for(name)), reference[name])
    assert max(apart.values()) > 2 * bound(name, "rowwise")


@pytest.mark.parametrize("name", ["sac", "td3", "redq"])
def test_mixing_up_the_members_of_an_ensemble_breaks_the_bound(name, reference, monkeypatch):
    multiply = linear_function.scaled_matmul

    def mixed_up(left, left_scale, *right, **options):
        left, left_scale = (
            each.roll(1, 0) if each.dim() == 3 else each for each in (left.view(torch.uint8), left_scale)
        )
        return multiply(left.view(torch.float8_e4m3fn), left_scale, *right, **options)

    watch(monkeypatch, mixed_up)
    apart = errors(gradients(build(name, "rowwise"), batch_for(name)), reference[name])
    assert max(apart.values()) > 2 * bound(name, "rowwise")


@every_loss
def test_a_layer_that_was_left_out_is_noticed(name, monkeypatch):
    watched = watch(monkeypatch)
    gradients(build(name), batch_for(name))
    assert not watched
    loss = build(name, "rowwise")
    network = loss.value_network if name == "dqn" else loss.actor_network
    path, layer = next((path, each) for path, each in network.named_modules() if isinstance(each, Float8Linear))
    network.set_submodule(path, layer.to_linear())
    gradients(loss, batch_for(name))
    missing = products_expected(name, "rowwise") - products_seen(watched)
    assert {layer for layer, *_ in missing} == {(OBSERVATION, ACTOR[0])}


# --- target networks ---


def moved(loss, name):
    """One step of gradient descent, and a soft update of the target networks by half the way."""
    updater = SoftUpdate(loss, tau=0.5)
    found = gradients(loss, batch_for(name))
    with torch.no_grad():
        for key, parameter in loss.named_parameters():
            if key in found:
                parameter -= 0.1 * found[key]
    updater.step()
    return gradients(loss, batch_for(name))


def fresh(loss, name):
    """The gradients of a loss that never saw other weights."""
    other = build(name, "rowwise")
    other.load_state_dict(loss.state_dict(), strict=False)  # REDQLoss makes a buffer at its first call
    return gradients(other, batch_for(name))


@pytest.mark.parametrize("name", ["dqn", "sac", "td3", "redq"])
def test_a_soft_update_is_seen_by_the_target_networks(name):
    loss = build(name, "rowwise")
    found = moved(loss, name)
    expected = fresh(loss, name)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_stale_codes_of_a_target_network_are_noticed(monkeypatch):
    monkeypatch.setattr(torch, "count_nonzero", lambda bits: torch.zeros(()))  # "the weight has not changed"
    loss = build("td3", "rowwise")
    found = moved(loss, "td3")
    expected = fresh(loss, "td3")
    assert not all(torch.equal(found[key], expected[key]) for key in expected)
