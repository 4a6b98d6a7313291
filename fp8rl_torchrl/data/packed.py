"""`PackedReplayBuffer`: TorchRL's replay buffer on packed rows, so that a batch is one gather."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, SamplerWithoutReplacement
from torchrl.data.replay_buffers.storages import _get_default_collate

from fp8rl_torchrl.data.rows import RowLayout, why_no_rows


class PackedStorage(LazyTensorStorage):
    """A `LazyTensorStorage` whose tensors are views of one block of rows: a transition is one row.

    Only the place in memory differs: reading, writing, saving and loading are `LazyTensorStorage`'s, and each can load
    what the other saved. The first transitions decide about the layout; what rows cannot hold (images, non-tensor data,
    transitions with batch dimensions, ...) is stored as `LazyTensorStorage` stores it.

    Args:
        max_size: The number of transitions kept.
        device: Where they are stored.

    Raises:
        ValueError: If ``max_size`` is not an integer of at least 1.

    Attributes:
        rows: int64 ``[max_size, words]``, or None: nothing is stored yet, or not as rows.
        layout: Where each tensor lies in its row; None when ``rows`` is.
        obstacle: Why there are no rows although something is stored; None otherwise.
    """

    rows: torch.Tensor | None = None
    layout: RowLayout | None = None
    obstacle: str | None = None

    def __init__(self, max_size: int, *, device: torch.device | str = "cpu") -> None:
        if type(max_size) is not int or max_size < 1:
            raise ValueError(f"max_size must be an integer >= 1; got {max_size!r}")
        super().__init__(max_size, device=device)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Write transitions: many at once are packed aside and copied into their rows together.

        Args:
            cursor: Their places: an int, a slice, or int64 ``[N]``.
            data: The transitions.
            set_cursor: Whether this is the newest data, and not a correction.
        """
        many = isinstance(cursor, torch.Tensor) and cursor.ndim == 1
        if many and not self.initialized:
            self._init(data[0])
        if self.layout is not None and isinstance(data, TensorDictBase):
            difference = self.layout.difference(data if data.batch_dims else data[None])
            if difference is not None:
                self._unpack(difference)
        if self.layout is None or self.rows is None or not many:
            super().set(cursor, data, set_cursor=set_cursor)  # type: ignore[arg-type]
            return
        if set_cursor:
            self._set_last_cursor(cursor)
            self._get_new_len(data, cursor)
        newest = slice(-self.max_size, None)  # of more transitions than there are rows, the first leave no trace
        self.rows.index_copy_(0, cursor[newest].to(self.rows.device), self.layout.pack(data[newest]))
        self._bump_mutation_revision()

    def _init(self, data: Any) -> None:
        self.rows = self.layout = None
        self.obstacle = why_no_rows(data) if self.device != "auto" else "the device of the storage is 'auto'"
        if self.obstacle is not None:
            super()._init(data)
            return
        device: Any = self.device
        self.layout = RowLayout(data, torch.device(device))
        self.rows = self.layout.empty(self.max_size)
        self._storage = self.layout.view(self.rows)
        self.initialized = True

    def _unpack(self, obstacle: str) -> None:
        """Store from now on as `LazyTensorStorage` does."""
        self._storage = self._storage.clone()
        self.rows = self.layout = None
        self.obstacle = obstacle

    def state_dict(self) -> dict[str, Any]:
        """The transitions, copied out of the rows, and their number."""
        state = super().state_dict()
        if self.rows is not None:  # torch.save refuses views in several dtypes of one memory
            state["_storage"] = self._storage.clone().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, here or in a `LazyTensorStorage`."""
        stored = state_dict["_storage"]
        if not self.initialized and isinstance(stored, OrderedDict) and stored:
            self._init(TensorDict().load_state_dict(stored, strict=False)[0])
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """The state of the storage, without the views of its rows."""
        state = super().__getstate__()
        if self.layout is not None:
            state["_storage"] = None  # a pickle does not keep that tensors share memory
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, and view its rows again."""
        super().__setstate__(state)
        if self.layout is not None and self.rows is not None:
            self._storage = self.layout.view(self.rows)


class PackedReplayBuffer(TensorDictReplayBuffer):
    """TorchRL's `TensorDictReplayBuffer`, several times faster where its data are packed in rows.

    It takes and gives the same, draws the same transitions for the same seed, and saves the same files. A batch is one
    gather of rows, and its tensors are views of what was gathered: memory of that batch alone, but not contiguous.
    ``torch.save`` refuses tensors of several dtypes in one memory, so save ``batch.clone()``.

    Fast are `RandomSampler` (the default) and `SamplerWithoutReplacement` on a `PackedStorage`. With anything else
    (another sampler, transforms, prefetching, a storage that could not pack its data, ...) it does what
    `TensorDictReplayBuffer` does, as fast as that, and says so once, in a ``UserWarning`` at the first sample.

    Args:
        **kwargs: Those of `TensorDictReplayBuffer`; ``storage`` should be a `PackedStorage`.

    Example:
        >>> buffer = PackedReplayBuffer(storage=PackedStorage(1000), batch_size=4)
        >>> indices = buffer.extend(TensorDict(reward=torch.arange(10.0), batch_size=10))
        >>> buffer.sample()["reward"].shape
        torch.Size([4])
        >>> [batch.batch_size for batch in buffer.sample_many(2)]
        [torch.Size([4]), torch.Size([4])]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._said: set[str] = set()

    def sample(
        self, batch_size: int | None = None, return_info: bool = False, include_info: bool | None = None
    ) -> TensorDictBase:
        """Draw a batch, as `TensorDictReplayBuffer.sample` does.

        Args:
            batch_size: The number of transitions ``B``; by default that of the constructor.
            return_info: Whether to return a tuple of the batch and what the sampler tells.
            include_info: A deprecated name of the same.

        Returns:
            A TensorDict ``[B]``, whose ``index`` names the transitions' places.
        """
        size = self._fast_size(batch_size)
        if size is None or return_info or include_info is not None:
            return super().sample(batch_size, return_info, include_info)
        with self._replay_lock, self._write_lock:
            return self._gather(self._draw(size))

    def sample_many(self, count: int, batch_size: int | None = None) -> list[TensorDictBase]:
        """Draw several independent batches at once: what ``count`` calls of `sample` draw, gathered together.

        On a GPU the draws are others than those of single calls, since its random numbers depend on how many are drawn
        together. All batches keep the memory of all alive.

        Args:
            count: The number of batches.
            batch_size: The number of transitions in each; by default that of the constructor.

        Returns:
            ``count`` TensorDicts ``[B]``; no two share memory.

        Raises:
            ValueError: If ``count`` is not an integer of at least 1.
        """
        if type(count) is not int or count < 1:
            raise ValueError(f"count must be an integer >= 1; got {count!r}")
        size = self._fast_size(batch_size)
        if size is None:
            return [self.sample(batch_size) for _ in range(count)]
        storage: Any = self._storage
        with self._replay_lock, self._write_lock:
            if type(self._sampler) is RandomSampler:
                index = self._draw(count * size)
            else:
                parts = [self._draw(size) for _ in range(count)]
                if any(len(part) < size for part in parts):  # passes whose last batch is smaller
                    return [self._gather(part) for part in parts]
                index = torch.cat(parts)
            return storage.layout.batches(storage.rows.index_select(0, index), index, count)

    def _draw(self, size: int) -> torch.Tensor:
        """The places of a batch: int64 ``[size]``."""
        storage: Any = self._storage
        if type(self._sampler) is RandomSampler:
            # The draw of `RandomSampler`, without the layers around it, which cost more than all the rest.
            return torch.randint(0, storage._len, (size,), generator=storage._rng, device=storage.device)
        return self._sampler.sample(storage, size)[0].to(storage.device)

    def _gather(self, index: torch.Tensor) -> TensorDict:
        storage: Any = self._storage
        return storage.layout.batch(storage.rows.index_select(0, index), index)

    def _fast_size(self, batch_size: int | None) -> int | None:
        """The size of a batch that can be gathered from rows, or None: TorchRL's own code must draw it, or refuse."""
        size = self._batch_size if batch_size is None else batch_size
        obstacle = self._obstacle()
        if obstacle is not None:
            if obstacle not in self._said:
                self._said.add(obstacle)
                warnings.warn(f"sampling as TensorDictReplayBuffer does, not from rows: {obstacle}", stacklevel=3)
            return None
        storage: Any = self._storage
        other = self._batch_size is not None and size != self._batch_size and not self._warned_batch_size_conflict
        waiting = self._service_shutdown or self._sample_dependency is not None
        return None if size is None or other or waiting or storage._len == 0 else size

    def _obstacle(self) -> str | None:
        """What forbids the fast way, in words."""
        if not self._initialized:
            self._init()
        storage: Any = self._storage
        if type(storage) is not PackedStorage:
            return f"the storage is a {type(storage).__name__}, not a PackedStorage"
        if type(self._sampler) not in (RandomSampler, SamplerWithoutReplacement):
            return f"the sampler is a {type(self._sampler).__name__}"
        if len(self._transform):  # type: ignore[arg-type] # a Compose
            return "there are transforms"
        if self._prefetch or self._pin_memory or self._sample_unit is not None or self._writer.tracks_generations:
            return "prefetch, pin_memory, a sample unit or tracked generations were asked for"
        if self._collate_fn is not _get_default_collate(storage):
            return "there is a collate_fn"
        return storage.obstacle
