"""The constants of the custom environment: what is refused, and the limits that follow from them."""

import dataclasses

import pytest

from fp8rl_torchrl.envs.custom_constants import CustomConstants


def test_limits_of_the_defaults():
    constants = CustomConstants()
    # Friction 0.1 cancels force 1 at speed 10; one step of 0.1 s at that speed leads 1.0 beyond the bound of 2.4.
    assert constants.terminal_velocity == pytest.approx(10)
    assert constants.max_velocity == pytest.approx(10, rel=1e-4)
    assert constants.max_position == pytest.approx(3.4, rel=1e-4)
    low, high = constants.reward_range
    assert high == pytest.approx(1.1, abs=1e-4)
    assert low == pytest.approx(1.1 - 3.4 / 2.4, abs=1e-4)


def test_without_friction_the_step_limit_bounds_the_speed():
    constants = CustomConstants(friction=0.0, max_steps=20)
    assert constants.terminal_velocity == float("inf")
    assert constants.max_velocity == pytest.approx(0.05 + 20 * 0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dt": 0.0}, "dt must be > 0"),
        ({"force": -1.0}, "force must be > 0"),
        ({"friction": -0.1}, "friction must be >= 0"),
        ({"friction": 10.1}, "friction \\* dt at most 1"),
        ({"bound": 0.5}, "bound must be > 0.5"),
        ({"target": 2.5}, "target must lie within the bound"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1"),
        ({"max_steps": True}, "max_steps must be an integer >= 1"),
        ({"survival_reward": float("nan")}, "every constant must be a finite number"),
        ({"force": float("inf")}, "every constant must be a finite number"),
        ({"max_steps": 1.5}, "max_steps must be an integer >= 1"),
    ],
)
def test_senseless_constants_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CustomConstants(**wrong)


def test_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CustomConstants().dt = 1.0
