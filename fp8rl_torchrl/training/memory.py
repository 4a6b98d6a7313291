"""How this process keeps memory that tensors gave back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor, instead of giving it back to the system.

    Tensors of a few MB, such as the activations of a batch on a CPU, are otherwise new memory in every update, which
    the system clears page by page: that can take as long as the arithmetic. It holds for the whole process, from now
    on; the process keeps the most that it ever used. Only glibc has these options.

    Returns:
        Whether it worked.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = {_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
