"""The default pipeline, composed by hand from components, in FP16 with a live loss scaler."""

import torch
from torchrl.collectors import Collector  # the class that was called SyncDataCollector until torchrl 0.13
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

import fp8rl_torchrl as f8

env = f8.envs.CustomEnv(num_envs=128, seed=0)
agent = f8.ActorCritic.for_env(env, hidden=(64, 64))
collector = Collector(env, agent.policy, frames_per_batch=1024, total_frames=-1, auto_register_policy_transforms=False)
replay = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=64)
loss = f8.objectives.ReplayedActorCriticLoss(agent, gamma=0.99, entropy_coeff=0.05)
optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)
step = f8.OptimStep(loss, optimizer, f8.Precision("fp16"), max_grad_norm=0.5)
config = f8.training.LoopConfig(total_frames=200_000)
for report in f8.Pipeline(env, agent, collector, replay, loss, step, config):
    print(f"{report.frames:>7,} frames, return {report.episode_return:5.1f}, loss scale {report.metrics['loss_scale']}")
print(f8.evaluate(agent.policy, env, episodes=20).mean)
