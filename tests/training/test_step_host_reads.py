"""`OptimStep` never waits for the device: an update reads nothing on the host."""

import pytest
import torch
from losses import (
    INF,
    NAN,
    PRECISIONS,
    Loss,
    adam,
    by_key,
    data,
    dqn,
    gradient_of,
    regression,
    target_bits,
    transitions,
    two_losses,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.objectives import HardUpdate, SoftUpdate

from fp8rl_torchrl import ActorCritic, OptimStep
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss

pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


class NoHostReads(TorchDispatchMode):
    """Fails where a value on the device would be read on the host."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.partition("::")[2]
        if name in self.READS:
            raise AssertionError(f"aten::{name} waits for the device")
        return func(*args, **(kwargs or {}))


def complete_steps(precision, device="cpu"):
    """Steps that use everything `OptimStep` offers; each comes with its batches."""
    dtype = {"device": device}
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).to(**dtype)
    loss = Loss(model, lambda model, batch: (model(batch["x"]).float() - batch["y"]).square().mean())
    schedule = {"lr_schedule": lambda done: (1 - done / 100).clamp(min=0.1), "max_grad_norm": 0.5}
    bad = data(seed=5).to(device)
    bad["y"] = torch.full_like(bad["y"], NAN)
    batches = [data(seed=seed).to(device) for seed in range(4)] + [bad]
    yield OptimStep(loss, adam(loss.parameters()), precision, accumulate=2, **schedule), [*batches, batches[0]]

    two = two_losses().to(**dtype)
    yield OptimStep(two, by_key(two), precision, **schedule), [gradient_of(1.0, INF).to(device)] * 3

    env = CustomEnv(num_envs=4, seed=0, device=device)
    agent = ActorCritic.for_env(env)
    actor_critic = ReplayedActorCriticLoss(agent)
    rollout = env.rollout(8, agent.policy).flatten().detach()
    yield OptimStep(actor_critic, adam(agent.parameters()), precision, **schedule), [rollout] * 3


def run_without_host_reads(precision):
    for step, batches in complete_steps(precision):
        step(batches[0])  # the first call checks that losses and optimizers fit together, and may read
        with NoHostReads():
            for batch in batches[1:]:
                step(batch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_reads_nothing_on_the_host(precision):
    run_without_host_reads(precision)


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_target_networks_move_without_host_reads(updater):
    loss = dqn()
    options = {"tau": 0.1} if updater is SoftUpdate else {"value_network_update_interval": 2}
    step = OptimStep(loss, adam(loss.parameters()), "fp16", target_updater=updater(loss, **options))
    step.loss = Loss(loss, lambda loss, batch: sum(p.square().sum() for p in loss.parameters()))
    before = target_bits(loss)
    with NoHostReads():
        for seed in range(4):
            step(transitions(seed))
    assert target_bits(loss) != before
    assert step.updates == 4


def test_host_reads_are_caught(monkeypatch):
    """Negative twin: a step that asks on the host whether to skip, as `GradScaler.step` does for other optimizers."""
    guarded = OptimStep._apply

    def asking(self, due):
        assert self._finite[next(iter(self._finite))].item()
        return guarded(self, due)

    monkeypatch.setattr(OptimStep, "_apply", asking)
    with pytest.raises(AssertionError, match="aten::_local_scalar_dense waits for the device"):
        run_without_host_reads("fp16")


def test_the_stock_scaler_with_a_plain_optimizer_is_caught():
    loss = regression()
    optimizer, scaler = torch.optim.Adam(loss.parameters()), torch.amp.GradScaler("cpu")
    with NoHostReads():
        scaler.scale(loss(data())["loss"]).backward()
        with pytest.raises(AssertionError, match="waits for the device"):
            scaler.step(optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_does_not_synchronise_a_gpu(precision):
    for step, batches in complete_steps(precision, "cuda"):
        step(batches[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[1:]:
                step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert step.updates + step.skipped_steps > 1


@pytest.mark.gpu
def test_a_host_read_on_a_gpu_is_caught(monkeypatch):
    guarded = OptimStep._apply
    monkeypatch.setattr(OptimStep, "_apply", lambda self, m: guarded(self, m) if self.updates.item() >= 0 else None)
    step, batches = next(complete_steps("fp16", "cuda"))
    step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
