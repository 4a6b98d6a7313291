"""Pictures of the custom environment show what the state is."""

import numpy as np
import pytest

from fp8rl_torchrl.envs.custom_constants import CustomConstants
from fp8rl_torchrl.envs.rendering import render_frame

MASS, PUSH, TIME, TARGET = (52, 92, 168), (232, 130, 24), (150, 154, 162), (38, 148, 84)


def picture(position, velocity=0.0, action=-1, step_count=0, **constants):
    return render_frame(CustomConstants(**constants), np.float32([position, velocity]), action, step_count)


def columns(frame, color, rows=slice(None)):
    """The columns (0 to 599) in which there is a pixel of exactly this colour."""
    return np.flatnonzero((frame[rows] == color).all(-1).any(0))


BODY = slice(130, 160)  # the rows of the mass itself, below its velocity arrow
ABOVE = slice(100, 120)


@pytest.mark.parametrize("position", [-2.4, -1.0, 0.0, 0.37, 2.0])
def test_the_mass_is_where_the_position_says(position):
    frame = picture(position)
    assert frame.shape == (240, 600, 3)
    assert frame.dtype == np.uint8
    # 600 pixels show 2.5 bounds = 6 units: 100 pixels a unit, 0 in the middle
    assert columns(frame, MASS, BODY).mean() == pytest.approx(300 + 100 * position, abs=1)


def test_the_mass_stays_in_the_picture():
    assert columns(picture(30.0), MASS, BODY).max() >= 597
    assert columns(picture(-30.0), MASS, BODY).min() <= 2


def test_the_velocity_arrow_points_along_the_velocity():
    assert len(columns(picture(0.0, 0.0), MASS, ABOVE)) == 0
    right, left = columns(picture(0.0, 1.0), MASS, ABOVE), columns(picture(0.0, -1.0), MASS, ABOVE)
    assert right.min() >= 299
    assert right.max() == pytest.approx(300 + 110, abs=4)
    assert left.max() <= 300
    assert left.min() == pytest.approx(300 - 110, abs=4)
    assert len(columns(picture(0.0, 0.5), MASS, ABOVE)) < len(right)
    assert columns(picture(2.4, 3.0), MASS, ABOVE).max() < 600


def test_the_push_arrow_is_behind_the_push():
    assert len(columns(picture(0.0, action=-1), PUSH)) == 0
    assert columns(picture(0.0, action=1), PUSH).max() < 300 - 24
    assert columns(picture(0.0, action=0), PUSH).min() > 300 + 24


def test_the_bar_is_the_part_of_the_episode_that_has_passed():
    assert len(columns(picture(0.0), TIME)) == 0
    assert len(columns(picture(0.0, step_count=100), TIME)) == pytest.approx(250, abs=4)
    assert len(columns(picture(0.0, step_count=200), TIME)) == pytest.approx(500, abs=4)
    assert len(columns(picture(0.0, step_count=25, max_steps=50), TIME)) == pytest.approx(250, abs=4)


def test_the_target_is_marked():
    assert columns(picture(-2.0, target=1.0), TARGET).mean() == pytest.approx(400, abs=1)
