"""`AcrobotEnv`: steps by hand, and step for step and return for return Gymnasium's Acrobot-v1."""

import math
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from episode_returns import CRITICAL, gymnasium_returns, native_returns, scaled_distance
from gymnasium_twin import Twin, anywhere, assert_agrees, assert_starts_agree, step_of, visited
from hypothesis import given
from hypothesis import strategies as st
from rollouts import assert_in_specs, push, run

from fp8rl_torchrl.envs import check_env
from fp8rl_torchrl.envs.classic_control import AcrobotDynamics, AcrobotEnv
from fp8rl_torchrl.envs.classic_control._angles import wrapped

RANDOM, PUMPING = 10, 12  # episodes


def near(after, bound):
    height = -np.cos(after[:, 0]) - np.cos(after[:, 0] + after[:, 1])
    return np.abs(height - 1) <= 2 * bound[0] + bound[1]


ACROBOT = Twin(id="Acrobot-v1", env=AcrobotEnv, seen=(0, 0, 1, 1, 2, 3), turning=(0, 1), near=near)
states = ACROBOT.states


def one_step(dynamics, physics, action, step_count=0):
    """From one state, in float64."""
    state = states([physics], step_count, torch.float64)
    following, _, reward, terminated, truncated = dynamics.step(state, torch.tensor([action]))
    return ACROBOT.physics(following)[0], reward.item(), terminated.item(), truncated.item()


# --- by hand ---


def test_the_accelerations_by_hand():
    # Both links hang: the mass matrix is [[4.5, 1.75], [1.75, 1.25]], its determinant 2.5625. A torque of 1 at the
    # elbow alone accelerates by -1.75 / 2.5625 and 4.5 / 2.5625. A step of 1 ms is too short for anything else.
    following, *_ = one_step(AcrobotDynamics(dt=1e-3), [0.0, 0.0, 0.0, 0.0], 2)
    assert following[2:].tolist() == pytest.approx([-0.682927e-3, 1.756098e-3], rel=1e-4)
    # Both links are level: the weights pull with 9.8 * (1.5 + 0.5) and 9.8 * 0.5, hence -(1.25 * 19.6 - 1.75 * 4.9) /
    # 2.5625 and -(4.5 * 4.9 - 1.75 * 19.6) / 2.5625.
    following, *_ = one_step(AcrobotDynamics(dt=1e-3), [math.pi / 2, 0.0, 0.0, 0.0], 1)
    assert following[2:].tolist() == pytest.approx([-6.214634e-3, 4.780488e-3], rel=1e-4)
    # The elbow is bent by 90°: [[3.5, 1.25], [1.25, 1.25]], determinant 2.8125. At 2 and 3 rad/s, with the first link
    # down, the shoulder feels 0.5 * 3 * (3 + 4) - 4.9 = 5.6 and the elbow -0.5 * 4 - 4.9 = -6.9.
    following, *_ = one_step(AcrobotDynamics(dt=1e-6), [0.0, math.pi / 2, 2.0, 3.0], 1)
    by_hand = [(1.25 * 5.6 + 1.25 * 6.9) / 2.8125, (-3.5 * 6.9 - 1.25 * 5.6) / 2.8125]
    assert ((following[2:] - [2.0, 3.0]) / 1e-6).tolist() == pytest.approx(by_hand, rel=1e-4)


def energy(angle_1, angle_2, velocity_1, velocity_2):
    """Of the default links, J: of the centers' motion, of the turning, and of the height."""
    total = angle_1 + angle_2
    motion_1 = 0.25 * velocity_1**2
    both = velocity_1 + velocity_2
    motion_2 = velocity_1**2 + 0.25 * both**2 + velocity_1 * both * math.cos(angle_2)
    turning = velocity_1**2 + both**2
    height = -1.5 * math.cos(angle_1) - 0.5 * math.cos(total)
    return 0.5 * (motion_1 + motion_2 + turning) + 9.8 * height


def drift(dynamics, steps):
    """By how much the energy changes without a torque."""
    physics = [2.0, -1.0, 0.5, 0.3]
    before = energy(*physics)
    for _ in range(steps):
        physics, *_ = one_step(dynamics, physics, 1)
    return abs(energy(*physics) - before)


def test_energy_is_kept_as_well_as_a_method_of_fourth_order_can():
    coarse, fine = drift(AcrobotDynamics(dt=0.01), 200), drift(AcrobotDynamics(dt=0.005), 400)
    assert coarse < 1e-7
    assert coarse / fine > 12  # 2^4 in the limit; a method of third order has 2^3
    euler = drift(Euler(dt=0.01), 200), drift(Euler(dt=0.005), 400)  # negative twin
    assert euler[1] > 0.1
    assert euler[0] / euler[1] < 4


def test_left_is_the_mirror_image_of_right():
    physics = np.array([[0.3, -0.4, 0.5, 0.7]])
    ahead, _, *_ = AcrobotDynamics().step(states(physics), torch.tensor([2]))
    back, _, *_ = AcrobotDynamics().step(states(-physics), torch.tensor([0]))
    assert np.array_equal(ACROBOT.physics(ahead), -ACROBOT.physics(back))


@pytest.mark.parametrize(
    ("angles", "step_count", "outcome"),
    [
        ([2.09, 0.0], 0, (-1.0, False, False)),  # -2 cos(2.09) = 0.992
        ([2.10, 0.0], 0, (0.0, True, False)),  # 1.010
        ([-2.10, 0.0], 0, (0.0, True, False)),
        ([math.pi, 1.56], 0, (0.0, True, False)),  # 1 + cos(1.56) = 1.011
        ([math.pi, 1.58], 0, (-1.0, False, False)),  # 0.991
        ([0.0, 0.0], 498, (-1.0, False, False)),
        ([0.0, 0.0], 499, (-1.0, False, True)),
        ([2.10, 0.0], 499, (0.0, True, True)),
    ],
)
def test_the_ends_of_an_episode(angles, step_count, outcome):
    assert one_step(AcrobotDynamics(dt=1e-6), [*angles, 0.0, 0.0], 1, step_count)[1:] == outcome


@given(st.floats(-4e5, 4e5, width=32))
def test_an_angle_is_wrapped_as_exactly_as_it_is_given(angle):
    result = wrapped(torch.tensor(angle)).item()
    assert abs(result) <= np.float32(math.pi)
    # An ulp of what was given, and one of the result, of at most 2.4e-7.
    exact = np.spacing(np.float32(abs(angle))) + 2.4e-7
    assert abs(math.remainder(result - angle, 2 * math.pi)) <= exact


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_angle_is_wrapped_into_half_a_turn(angle):
    assert abs(wrapped(torch.tensor(angle)).item()) <= np.float32(math.pi)


# --- agreement with Gymnasium ---


def drive(episode, state, noise):
    """Random actions; then a torque the way the elbow moves, now and then another, up to the goal."""
    if episode < RANDOM or noise.random() < 0.1:
        return int(noise.integers(3))
    return 2 if state[3] > 0 else 0


@pytest.fixture(scope="module")
def steps():
    return visited(ACROBOT, drive, RANDOM + PUMPING)


def test_the_episodes_show_all_that_there_is_to_agree_on(steps):
    assert steps.terminated.sum() >= PUMPING
    assert steps.truncated.sum() >= 5
    assert set(steps.reward[steps.terminated]) == {0.0}
    assert set(steps.reward[~steps.terminated]) == {-1.0}
    assert (np.abs(steps.after[:, :2] - steps.before[:, :2]) > 4).any()  # an angle was wrapped
    assert set(steps.action) == {0, 1, 2}


def test_a_step_from_every_state_agrees(steps):
    assert_agrees(ACROBOT, AcrobotDynamics().step, steps)


def test_a_step_of_the_environment_agrees(steps):
    assert_agrees(ACROBOT, step_of(AcrobotEnv(len(steps.action), seed=0)), steps)


@pytest.fixture(scope="module")
def everywhere():
    return anywhere(ACROBOT, lambda noise, count: noise.integers(3, size=count), count=2048)


def test_the_equations_are_gymnasiums_wherever_a_state_may_be(everywhere):
    """In float64, as at top speed a step of 0.2 s makes an error 100 times as large, whatever computes it."""
    assert (np.abs(everywhere.after[:, 2:]) == [4 * np.pi, 9 * np.pi]).any(0).all()  # both velocities were clipped
    assert_agrees(ACROBOT, AcrobotDynamics().step, everywhere, bound=1e-11, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_agrees(ACROBOT, AcrobotDynamics(gravity=9.8000001).step, everywhere, bound=1e-11, dtype=torch.float64)


@pytest.mark.slow
def test_a_step_agrees_when_inductor_generates_the_code(steps):
    torch.compiler.reset()
    assert_agrees(ACROBOT, torch.compile(AcrobotDynamics().step, fullgraph=True), steps)


@dataclass(frozen=True, kw_only=True)
class Euler(AcrobotDynamics):
    """One evaluation of the equations a step."""

    def step(self, state, action):
        before = tuple(state)[:4]
        slope = self._slope(before, (action - 1).to(before[0].dtype) * self.torque)
        moved = [x + self.dt * dx for x, dx in zip(before, slope, strict=True)]
        state = state._replace(**dict(zip(state._fields, moved, strict=False)))
        return AcrobotDynamics(dt=1e-30).step(state, torch.ones_like(action))


@dataclass(frozen=True, kw_only=True)
class Paper(AcrobotDynamics):
    """The equations of the paper of 1996, which lack a term of the book's."""

    def _slope(self, physics, torque):
        missing = 0.5 * physics[1].sin() * physics[2].square()
        return super()._slope(physics, torque + missing)


@dataclass(frozen=True, kw_only=True)
class PaysAtTheGoal(AcrobotDynamics):
    """The step that reaches the goal costs as much as any other."""

    def step(self, state, action):
        following, observation, reward, *ends = super().step(state, action)
        reward = -torch.ones_like(reward)
        return following._replace(episode_reward=state.episode_reward + reward), observation, reward, *ends


WRONG = {
    "gravity 9.81": AcrobotDynamics(gravity=9.81),
    "mass 1": AcrobotDynamics(mass_1=1.0001),
    "mass 2": AcrobotDynamics(mass_2=1.0001),
    "length": AcrobotDynamics(length_1=1.0001),
    "center 1": AcrobotDynamics(center_1=0.5001),
    "center 2": AcrobotDynamics(center_2=0.5001),
    "inertia": AcrobotDynamics(inertia=1.0001),
    "torque": AcrobotDynamics(torque=1.0001),
    "speed 1": AcrobotDynamics(max_velocity_1=4.0),
    "speed 2": AcrobotDynamics(max_velocity_2=6.0),
    "height": AcrobotDynamics(goal_height=1.05),
    "dt": AcrobotDynamics(dt=0.20001),
    "499 steps": AcrobotDynamics(max_steps=499),
    "Euler": Euler(),
    "the paper's equations": Paper(),
    "the goal's reward": PaysAtTheGoal(),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_task_does_not_agree(name, steps):
    with pytest.raises(AssertionError):
        assert_agrees(ACROBOT, WRONG[name].step, steps)


EPISODES = 200


def pump(observation, noise):
    """A torque the way the elbow moves, in four steps of five."""
    return np.where(noise < 0.8, 2 * (observation[:, 5] > 0), 1).astype(np.int64)


@pytest.fixture(scope="module")
def expected():
    return gymnasium_returns("Acrobot-v1", pump, EPISODES)


def test_returns_have_the_same_distribution(expected):
    assert len(set(expected)) > 20
    assert scaled_distance(native_returns(AcrobotEnv(3 * EPISODES, seed=0), pump), expected) < CRITICAL


@pytest.mark.parametrize("constants", [{"torque": 1.3}, {"gravity": 12.0}, {"inertia": 0.7}, {"goal_height": 1.4}])
def test_returns_of_another_task_have_another_distribution(constants, expected):
    env = AcrobotEnv(3 * EPISODES, seed=0, **constants)
    assert scaled_distance(native_returns(env, pump), expected) > CRITICAL


class OtherStarts(AcrobotDynamics):
    @staticmethod
    def reset(seed, index, episode):
        start = AcrobotDynamics.reset(seed, index, episode)
        return start._replace(velocity_2=start.velocity_2 * 0.8)


def test_starts_have_the_same_distribution_and_fill_their_intervals():
    assert_starts_agree(ACROBOT, AcrobotDynamics())
    with pytest.raises(AssertionError):
        assert_starts_agree(ACROBOT, OtherStarts())
    index = torch.arange(4096)
    start = ACROBOT.physics(AcrobotDynamics.reset(torch.zeros_like(index), index, torch.zeros_like(index)))
    assert (np.abs(start).max(0) > 0.0999).all()
    assert np.abs(start).max() <= np.float32(0.1)
    assert np.abs(np.corrcoef(start.T) - np.eye(4)).max() < 4.5 / math.sqrt(4096)


# --- the environment ---


@pytest.mark.slow
def test_it_passes_every_check_over_whole_episodes():
    assert not check_env(lambda: AcrobotEnv(3)).not_reached


def test_truncated_at_step_500_and_not_before():
    following = run(AcrobotEnv(2, seed=0), push(1), 510)["next"]  # nothing swings it up
    assert following["truncated"].squeeze(-1).nonzero().tolist() == [[0, 499], [1, 499]]
    assert not following["terminated"].any()
    assert following["episode_reward"][:, 499].flatten().tolist() == [-500.0, -500.0]


def test_the_specs_are_gymnasiums():
    env, theirs = AcrobotEnv(), gymnasium.make("Acrobot-v1")
    seen = env.observation_spec["observation"].space
    assert env.action_spec.n == theirs.action_space.n
    np.testing.assert_allclose(seen.low, theirs.observation_space.low, rtol=2e-5)
    np.testing.assert_allclose(seen.high, theirs.observation_space.high, rtol=2e-5)


def test_values_stay_in_their_specs_even_where_the_constants_are_extreme():
    extreme = ({}, {"torque": 1e4}, {"dt": 2.0}, {"gravity": 1e3}, {"inertia": 1e-6}, {"max_velocity_2": 300.0})
    for constants in extreme:
        env = AcrobotEnv(4, seed=0, **constants)
        for policy in (push(0), push(2), None):
            assert_in_specs(env, policy, 60)
    angles = assert_in_specs(AcrobotEnv(4, seed=0, torque=1e4), push(2), 60)["state", "angle_2"]
    assert angles.max() > 3
    assert angles.min() < -3


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"gravity": 0.0}, "gravity must be > 0"),
        ({"mass_2": -1.0}, "mass_2 must be > 0"),
        ({"inertia": math.nan}, "inertia must be > 0"),
        ({"length_2": math.inf}, "every constant must be a finite number"),
        ({"max_velocity_1": 0.05}, "max_velocity_1 must be >= 0.1, the fastest start"),
        ({"goal_height": 2.0}, r"goal_height must be >= 0 and below length_1 \+ length_2"),
        ({"goal_height": -0.1}, r"goal_height must be >= 0 and below length_1 \+ length_2"),
        ({"dt": 100.0}, "dt must be smaller for such forces and speeds, or a step may overflow"),
        ({"torque": 1e300}, "dt must be smaller for such forces and speeds, or a step may overflow"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1"),
    ],
)
def test_bad_constants_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=f"AcrobotEnv: {message}"):
        AcrobotEnv(**constants)


def test_constants_that_are_just_not_refused_do_not_overflow():
    """The bound is one: at the largest dt that is allowed, and torques and speeds to match, all stays finite."""
    for constants in ({"dt": 4.0}, {"dt": 10.0}, {"torque": 1e5}, {"inertia": 1e-6}, {"max_velocity_2": 1e3}):
        assert_in_specs(AcrobotEnv(64, seed=0, **constants), None, 40)
