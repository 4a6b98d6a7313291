"""A user's own test of an environment, in three lines; and what it reports for a broken one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8rl_torchrl.envs import CustomEnv, EnvConformanceSuite
from fp8rl_torchrl.envs._conformance.findings import CHECKS

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent


class TestCustomEnv(EnvConformanceSuite):
    make_env = staticmethod(lambda: CustomEnv(num_envs=2, max_steps=20))
    max_steps = 60


def run_suite(pytester: pytest.Pytester, module: str, env: str) -> pytest.RunResult:
    pytester.makepyfile(
        walk=(HERE / "walk.py").read_text(),
        broken=(HERE / "broken.py").read_text(),
        test_env=f"""
            from {module} import {env}
            from fp8rl_torchrl.envs import EnvConformanceSuite

            class TestEnv(EnvConformanceSuite):
                make_env = staticmethod(lambda: {env}())
                max_steps = 60
        """,
    )
    return pytester.runpytest("-p", "no:xdist", "-p", "no:cacheprovider", "test_env.py")


def test_one_test_per_check_and_only_the_broken_one_fails(pytester: pytest.Pytester) -> None:
    result = run_suite(pytester, "broken", "NanReward")
    result.assert_outcomes(failed=1, skipped=1, passed=len(CHECKS) - 2)
    result.stdout.fnmatch_lines(["*'reward' (next)*is not finite*"])
    result.stdout.fnmatch_lines(["FAILED test_env.py::TestEnv::test_finite*"])


def test_the_correct_twin_passes_and_skips_with_a_reason(pytester: pytest.Pytester) -> None:
    result = run_suite(pytester, "walk", "Walk")
    result.assert_outcomes(skipped=1, passed=len(CHECKS) - 1)


def test_a_suite_without_make_env_says_what_is_missing() -> None:
    class Forgot(EnvConformanceSuite):
        pass

    with pytest.raises(pytest.fail.Exception, match="Forgot needs make_env"):
        Forgot().test_bounds()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_suite_has_a_test_for_every_check() -> None:
    tests = {name.removeprefix("test_") for name in vars(EnvConformanceSuite) if name.startswith("test_")}
    assert tests == set(CHECKS)
