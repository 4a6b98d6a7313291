"""Pictures of the custom environment, drawn in numpy: no display, no drawing library."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fp8rl_torchrl.envs.custom_constants import CustomConstants

WIDTH, HEIGHT = 600, 240
_TOP, _GROUND = 36.0, 170.0
_CART = (24.0, 15.0)  # half width and half height
_WHEEL = 6.5
_VELOCITY_SCALE, _LONGEST_ARROW = 110.0, 170.0  # pixels per unit of velocity, pixels

_PAPER, _OUTSIDE, _TRACK = (250, 250, 247), (250, 222, 218), (70, 74, 82)
_WALL, _TARGET, _MASS, _PUSH = (200, 60, 50), (38, 148, 84), (52, 92, 168), (232, 130, 24)
_TIME, _TIME_LEFT = (150, 154, 162), (228, 229, 232)


def render_frame(constants: CustomConstants, state: np.ndarray, action: int, step_count: int) -> np.ndarray:
    """Draw one state: the track between its two red bounds, the green target, and the blue mass on the track.

    The blue arrow above the mass is its velocity; the orange one beside it shows which way the last action pushed. The
    bar at the bottom is how much of the episode has passed.

    Args:
        constants: The constants of the environment.
        state: float32 ``[2]``, position and velocity.
        action: The last action, or -1 before the first one.
        step_count: Steps since the episode started.

    Returns:
        uint8 ``[240, 600, 3]``.
    """
    scale = WIDTH / (2.5 * constants.bound)
    bound, target = constants.bound * scale, constants.target * scale
    # A fast mass may end far beyond the bound; it stays in the picture.
    x = float(np.clip(state[0] * scale, -WIDTH / 2 + _CART[0], WIDTH / 2 - _CART[0]))
    y = _GROUND - _CART[1] - 1.4 * _WHEEL
    middle, half_height = (_GROUND + _TOP) / 2, (_GROUND - _TOP) / 2

    canvas = np.empty((HEIGHT, WIDTH, 3), dtype=np.float32)
    canvas[:] = _PAPER
    for side in (-1, 1):
        _paint(canvas, _box(side * (bound + WIDTH / 2), middle, WIDTH / 2, half_height), _OUTSIDE)
        _paint(canvas, _box(side * bound, middle, 2, half_height), _WALL)
    _paint(canvas, _box(target, middle, 1, half_height), _TARGET, dashed=True)
    _paint(canvas, _arrow(target, _TOP - 14, target, _TOP + 2, 0, 7), _TARGET)
    _paint(canvas, _box(0, _GROUND + 1.5, WIDTH / 2, 1.5), _TRACK)

    _paint(canvas, _box(x, y, *_CART, corner=5), _MASS)
    for offset in (-13, 13):
        _paint(canvas, _box(x + offset, _GROUND - _WHEEL, _WHEEL, _WHEEL, corner=_WHEEL), _TRACK)
    if action >= 0:
        side = 1 if action == 1 else -1
        _paint(canvas, _arrow(x - side * (_CART[0] + 34), y, x - side * (_CART[0] + 3), y, 3, 9), _PUSH)
    length = float(np.clip(state[1] * _VELOCITY_SCALE, -_LONGEST_ARROW, _LONGEST_ARROW))
    tip = float(np.clip(x + length, 4 - WIDTH / 2, WIDTH / 2 - 4))
    if abs(tip - x) >= 1:
        _paint(canvas, _arrow(x, y - 34, tip, y - 34, 2, min(7.0, abs(tip - x))), _MASS)

    passed = min(1.0, step_count / constants.max_steps)
    _paint(canvas, _box(0, HEIGHT - 22, 250, 4, corner=4), _TIME_LEFT)
    if passed > 0:
        _paint(canvas, _box(-250 * (1 - passed), HEIGHT - 22, 250 * passed, 4, corner=4), _TIME)
    return canvas.round().astype(np.uint8)


class _Shape(NamedTuple):
    """The signed distance from pixels to the outline of a shape, for the part of the picture that it lies in."""

    rows: slice
    columns: slice
    distance: np.ndarray


def _paint(canvas: np.ndarray, shape: _Shape, color: tuple[int, int, int], dashed: bool = False) -> None:
    """Fill the inside of a shape; the pixels of its outline are blended, so that it looks smooth."""
    cover = np.clip(0.5 - shape.distance, 0.0, 1.0)
    if dashed:
        cover[np.arange(len(cover)) % 10 >= 6] = 0.0
    part = canvas[shape.rows, shape.columns]
    part += cover[..., None] * (np.asarray(color, dtype=np.float32) - part)


def _part(x: float, y: float, reach_x: float, reach_y: float) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The rows and columns around a point, and their pixel centres, from the middle of the picture's top edge."""
    columns = slice(max(0, int(x - reach_x + WIDTH / 2 - 1)), max(0, int(x + reach_x + WIDTH / 2 + 2)))
    rows = slice(max(0, int(y - reach_y - 1)), max(0, int(y + reach_y + 2)))
    pixel_x = np.arange(WIDTH, dtype=np.float32)[columns] + 0.5 - WIDTH / 2
    pixel_y = np.arange(HEIGHT, dtype=np.float32)[rows] + 0.5
    return rows, columns, pixel_x[None], pixel_y[:, None]


def _box(x: float, y: float, half_width: float, half_height: float, corner: float = 0.0) -> _Shape:
    """A box with rounded corners; a disc if the corners are all there is."""
    rows, columns, pixel_x, pixel_y = _part(x, y, half_width, half_height)
    corner = min(corner, half_width, half_height)
    dx, dy = np.abs(pixel_x - x) - half_width + corner, np.abs(pixel_y - y) - half_height + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return _Shape(rows, columns, outside + np.minimum(np.maximum(dx, dy), 0) - corner)


def _arrow(x: float, y: float, tip_x: float, tip_y: float, half_shaft: float, half_head: float) -> _Shape:
    """An arrow; without a shaft, its head alone."""
    length = float(np.hypot(tip_x - x, tip_y - y))
    reach = length / 2 + half_head
    rows, columns, pixel_x, pixel_y = _part((x + tip_x) / 2, (y + tip_y) / 2, reach, reach)
    unit_x, unit_y = (tip_x - x) / length, (tip_y - y) / length
    behind = (tip_x - pixel_x) * unit_x + (tip_y - pixel_y) * unit_y
    aside = np.abs((tip_x - pixel_x) * unit_y - (tip_y - pixel_y) * unit_x)
    head_length = min(2 * half_head, length)
    head = np.maximum(aside - behind * half_head / head_length, behind - head_length)
    shaft = np.maximum(aside - half_shaft, np.maximum(head_length - 0.5 - behind, behind - length))
    return _Shape(rows, columns, np.minimum(head, shaft) if half_shaft else head)
