"""Counter-based noise for resets: an integer hash instead of a generator.

A `torch.Generator` cannot enter a compiled graph, and its stream depends on the order of the draws. A hash of counters
depends on nothing else, so the same counters give the same noise on every device, in eager, compiled and captured runs.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_WEYL = 0x9E3779B9


def _mix(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer finaliser: xor-shift, multiply, twice.

    Both multipliers are below 2^31, so that a product of 32-bit words never overflows int64: wrapping is then the
    mask's doing and not left to the compiler. They were found by Chris Wellons's hash-prospector (issue 19).
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def uniform(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor, *, streams: int) -> torch.Tensor:
    """Uniform noise in ``[0, 1)`` that is a pure function of its counters.

    Args:
        seed: int64, any shape; all 64 bits count.
        index: int64 of the same shape, the environment's place in the batch.
        episode: int64 of the same shape, the number of the episode.
        streams: How many independent draws of one episode are wanted.

    Returns:
        float32 ``[streams, ...]``, multiples of 2^-24. A stream does not depend on how many there are.
    """
    word = _mix((seed & _WORD) ^ _WEYL)
    for counter in (seed >> 32, index, episode):
        word = _mix((word + (counter & _WORD) + _WEYL) & _WORD)
    words = torch.stack([_mix((word + stream * _WEYL) & _WORD) for stream in range(streams)])
    return (words >> 8).to(torch.float32) * 2.0**-24
