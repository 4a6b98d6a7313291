"""Public names that are imported on first use, so that importing a package costs nothing (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: The package's ``__name__``.
        home: For each public name the module that defines it, relative to the package. A name that is its own home is
            a subpackage.
    """

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(home))}")
        module = import_module(f"{package}.{home[name]}")
        return module if home[name] == name else getattr(module, name)

    return get, lambda: sorted(home)
