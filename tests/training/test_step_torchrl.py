"""`OptimStep` with TorchRL's own parts: its losses and its trainer."""

import pytest
import torch
from losses import INF, adam, bits, descent, dqn, gradient_of, linear, named, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, SACLoss, SoftUpdate
from torchrl.trainers import OptimizationStepper, Trainer

from fp8rl_torchrl import ActorCritic, OptimStep
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss


def continuous_actor():
    torch.manual_seed(0)
    network = nn.Sequential(MLP(3, 4, num_cells=[16]), NormalParamExtractor())
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (2,)),
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def continuous_transitions(seed=0, reward=None):
    torch.manual_seed(seed)
    batch = transitions(seed, reward)
    with torch.no_grad():
        continuous_actor()(batch)
    return batch


def value_operator(inputs=3, in_keys=("observation",)):
    return ValueOperator(MLP(inputs, 1, num_cells=[16]), in_keys=list(in_keys))


def torchrl_losses(name):
    if name == "A2C":
        return A2CLoss(continuous_actor(), value_operator())
    if name == "PPO":
        return ClipPPOLoss(continuous_actor(), value_operator())
    if name == "SAC":
        critic = ValueOperator(_Concatenated(MLP(5, 1, num_cells=[16])), in_keys=["observation", "action"])
        return SACLoss(continuous_actor(), critic, num_qvalue_nets=2, action_spec=Bounded(-1, 1, (2,)))
    return dqn()


class _Concatenated(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, observation, action):
        return self.network(torch.cat((observation, action), -1))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["A2C", "PPO", "DQN", "SAC"])
@pytest.mark.filterwarnings("ignore:.*end the networks in float32", "ignore::DeprecationWarning")
def test_torchrls_losses_train(name, precision):
    loss = torchrl_losses(name)
    batch = transitions() if name == "DQN" else continuous_transitions()
    if name in ("A2C", "PPO"):  # advantages are estimated outside of autocast
        loss.make_value_estimator(gamma=0.9)
        loss.value_estimator(
            batch, params=loss.critic_network_params.detach(), target_params=loss.target_critic_network_params
        )
    updater = SoftUpdate(loss, tau=0.1) if name in ("DQN", "SAC") else None
    step = OptimStep(
        loss, adam(loss.parameters(), lr=1e-3), named(precision), max_grad_norm=1.0, target_updater=updater
    )
    before = bits(dict(loss.named_parameters()))
    metrics = [step(batch.clone()) for _ in range(3)]
    assert all(m["skipped"] == 0 for m in metrics)
    assert step.updates == 3
    after = bits(dict(loss.named_parameters()))
    assert all(after[key] != before[key] for key in before if "target" not in key)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:.*end the networks in float32")
def test_sac_with_an_optimizer_for_each_of_its_losses(precision):
    loss = torchrl_losses("SAC")
    optimizers = {
        "loss_actor": adam(loss.actor_network_params.flatten_keys().values()),
        "loss_qvalue": adam(loss.qvalue_network_params.flatten_keys().values()),
        "loss_alpha": adam([loss.log_alpha]),
    }
    parameters = {
        key: [p for p in each.param_groups[0]["params"] if p.requires_grad] for key, each in optimizers.items()
    }
    step = OptimStep(loss, optimizers, named(precision), target_updater=SoftUpdate(loss, tau=0.1))
    before = bits(parameters)
    metrics = step(continuous_transitions())
    assert metrics["skipped_loss_actor"] == metrics["skipped_loss_qvalue"] == metrics["skipped_loss_alpha"] == 0
    after = bits(parameters)
    assert all(after[key] != before[key] for key in before)

    # An infinite reward ruins the critic's loss alone, and the critic's update alone is skipped.
    before, targets = after, bits(loss.target_qvalue_network_params.flatten_keys(".").to_dict())
    metrics = step(continuous_transitions(1, reward=INF))
    assert metrics["skipped_loss_qvalue"] == 1
    assert metrics["skipped_loss_actor"] == metrics["skipped_loss_alpha"] == 0
    after = bits(parameters)
    assert {key: after[key] == before[key] for key in before} == {
        "loss_actor": False,
        "loss_qvalue": True,
        "loss_alpha": False,
    }
    assert bits(loss.target_qvalue_network_params.flatten_keys(".").to_dict()) == targets
    assert step.updates == 1


@pytest.mark.parametrize(("precision", "accumulate"), [("bf16", 1), ("fp16", 1), ("fp16", 2)])
def test_it_is_the_optimization_stepper_of_a_torchrl_trainer(precision, accumulate):
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env, hidden=(8,))
    loss = ReplayedActorCriticLoss(agent)
    step = OptimStep(loss, adam(agent.parameters(), lr=1e-2), precision, max_grad_norm=0.5, accumulate=accumulate)
    assert isinstance(step, OptimizationStepper)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
    trainer = Trainer(
        collector=Collector(
            env, agent.policy, frames_per_batch=32, total_frames=96, auto_register_policy_transforms=False
        ),
        total_frames=96,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimization_stepper=step,
        progress_bar=False,
        seed=0,
    )
    seen = []
    trainer.register_op("batch_process", lambda batch: replay.extend(batch.select(*loss.in_keys).reshape(-1)))
    trainer.register_op("process_optim_batch", lambda batch: replay.sample())
    trainer.register_op("post_optim_log", lambda batch: seen.append(int(step.updates)) or {})
    before = bits(agent.state_dict())
    trainer.train()
    assert bits(agent.state_dict()) != before
    # Three collections, two calls after each.
    assert seen == ([1, 2, 3, 4, 5, 6] if accumulate == 1 else [0, 1, 1, 2, 2, 3])


def test_the_trainers_loss_is_the_one_that_trains():
    """`step(trainer, batch)` asks the trainer for the loss, so that its execution backend stays in charge."""
    loss = linear()

    class Context:
        def compute_loss(self, batch):
            return TensorDict(loss=10 * loss(batch)["loss"])

    step = OptimStep(loss, descent(loss.parameters()), "fp32")
    step.step(Context(), gradient_of(1.0, 2.0))
    assert loss.model.weight.tolist() == [[-10.0, -20.0]]
