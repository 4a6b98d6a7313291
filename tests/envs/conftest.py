"""What the tests of environments share."""

import gymnasium
import pytest
from counting import Count, Reuses, Spaces


@pytest.fixture
def registered():
    """Gymnasium knows the environments of `counting.py`."""
    for name, creator in {"Count-v0": Count, "Spaces-v0": Spaces, "Reuses-v0": Reuses}.items():
        gymnasium.register(f"test/{name}", creator, disable_env_checker=True)
    yield
    for name in [name for name in gymnasium.registry if name.startswith("test/")]:
        del gymnasium.registry[name]
