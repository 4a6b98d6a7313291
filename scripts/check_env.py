"""Check that an environment keeps to its specs: ``python scripts/check_env.py CartPole-v1`` or ``module:function``."""

import sys

from fp8rl_torchrl.envs.conformance import main

if __name__ == "__main__":
    sys.exit(main())
