"""`OptimStep(cudagraph=True)`: captured updates follow the eager ones, and skip what they skip."""

import pytest
import torch
from losses import INF, adam, regression

from fp8rl_torchrl import ActorCritic, OptimStep, Precision
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import RolloutA2CLoss
from fp8rl_torchrl.training.flat import FlatParameter

FP32 = 1e-5


@pytest.mark.parametrize("compile", [False, True])
def test_a_cuda_graph_on_a_cpu_is_refused(compile):
    loss = regression()
    with pytest.raises(ValueError, match="cudagraph=True needs parameters on a GPU; these are on cpu"):
        OptimStep(loss, adam(loss.parameters()), "fp32", compile=compile, cudagraph=True)


def on_gpu(compile, cudagraph, precision="fp32", batches=20, bad=()):
    torch.manual_seed(0)
    env = CustomEnv(num_envs=32, seed=0, device="cuda")
    agent = ActorCritic.for_env(env, hidden=(64, 64))
    rollouts = [env.rollout(8, agent.policy).detach().contiguous() for _ in range(batches)]
    for place in bad:
        rollouts[place]["next", "reward"] = torch.full_like(rollouts[place]["next", "reward"], INF)
    loss = RolloutA2CLoss(agent)
    step = OptimStep(
        loss,
        adam([FlatParameter(loss.parameters())], lr=0.01),
        precision,
        max_grad_norm=0.5,
        lr_schedule=lambda done: 1 - done / 40,
        compile=compile,
        cudagraph=cudagraph,
    )
    metrics = []
    for rollout in rollouts:
        losses = step(rollout.select(*loss.in_keys))
        metrics.append({key: value.clone() for key, value in losses.items()})
    return agent, step, metrics


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_captured_updates_follow_the_eager_ones(compile):
    expected_agent, expected_step, expected = on_gpu(False, False)
    agent, step, found = on_gpu(compile, True)
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            assert torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5), key
    assert step.updates == expected_step.updates == 20
    assert step.skipped_steps == 0
    assert step.optimizers["loss"].param_groups[0]["lr"].item() == pytest.approx(0.01 * (1 - 19 / 40))
    ours, theirs = (torch.cat([p.flatten() for p in each.parameters()]) for each in (agent, expected_agent))
    assert (ours - theirs).norm() <= FP32 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", Precision("fp16", init_scale=64.0)], ids=str)
def test_a_captured_update_is_skipped_where_the_loss_is_not_finite(precision):
    _, step, metrics = on_gpu(True, True, precision, bad=(12, 15))
    assert (int(step.updates), int(step.skipped_steps)) == (18, 2)
    assert [place for place, each in enumerate(metrics) if each["skipped"] == 1] == [12, 15]
    assert step.optimizers["loss"].param_groups[0]["lr"].item() == pytest.approx(0.01 * (1 - 17 / 40))
