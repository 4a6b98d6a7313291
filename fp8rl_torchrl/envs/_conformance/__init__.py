"""The checks behind `fp8rl_torchrl.envs.check_env`; nothing here is public."""
