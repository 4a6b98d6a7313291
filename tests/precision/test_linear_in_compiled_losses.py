"""`Float8Linear` inside TorchRL's compiled losses: the eager gradients, and the same products of the same layers."""

import pytest
import torch
from float8_layers import base, relative, watch
from test_linear_in_losses import bound, errors, products_expected, products_seen
from torchrl_losses import LOSSES, batch_for, build, gradients, traces_whole

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")]

WITH_GAE = [name for name in LOSSES if not traces_whole(name)]
# Every loss outside and inside autocast; the recipes take turns.
CASES = [(name, "rowwise", "fp32") for name in LOSSES] + [
    (name, ("tensorwise", "rowwise-gw-hp")[place % 2], "bf16") for place, name in enumerate(LOSSES)
]


@pytest.fixture(autouse=True)
def clean_compiler():
    """Compile anew, and draw the random numbers that the eager mode draws."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True, force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "recipe", "autocast"), CASES)
def test_compiled_gradients_are_the_eager_ones(name, recipe, autocast, monkeypatch):
    batch, loss = batch_for(name), build(name, recipe)
    reference = gradients(build(name), batch)
    with base(autocast):
        eager = gradients(loss, batch)
        compiled = torch.compile(loss, fullgraph=traces_whole(name))
        gradients(compiled, batch)  # compiles
        watched = watch(monkeypatch)
        found = gradients(compiled, batch)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert max(errors(found, reference).values()) <= bound(name, recipe)
    # The same codes, so far closer to eager FP8 than FP8 is to FP32. Inside BF16 autocast the compiler rounds less
    # often between two layers than the eager mode, by δ = .003. That moves a share δ/step of the numbers past a middle
    # between two codes, by a whole step, hence √(δ·step) = .015 to .02 a cast: about half of the quantization error.
    assert max(errors(found, eager).values()) < (1e-3 if autocast == "fp32" else bound(name, recipe) / 2)
    # Compilers call emulated products as they are, so they can be watched at run time.
    assert products_seen(watched) == products_expected(name, recipe)


@pytest.mark.parametrize("name", WITH_GAE)
def test_gae_breaks_the_graph_with_plain_layers_too(name):
    compiled = torch.compile(build(name), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nan_mask"):
        compiled(batch_for(name))


@pytest.mark.parametrize("name", WITH_GAE)
def test_with_advantages_at_hand_they_trace_whole(name):
    loss, batch = build(name, "rowwise"), batch_for(name)
    with torch.no_grad():
        params = loss.critic_network_params
        loss.value_estimator(batch, params=params, target_params=loss.target_critic_network_params)
    eager = gradients(loss, batch)
    found = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), batch)
    assert max(errors(found, eager).values()) < 1e-3


def test_a_soft_update_is_seen_by_a_compiled_loss():
    loss, batch = build("dqn", "rowwise"), batch_for("dqn")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    before = gradients(compiled, batch)
    with torch.no_grad():
        for target in loss.target_value_network_params.values(True, True):
            target.mul_(0.5)
    found, eager = gradients(compiled, batch), gradients(loss, batch)
    assert max(errors(found, eager).values()) < 1e-3
    assert max(relative(found[key], before[key]) for key in found) > 0.01
