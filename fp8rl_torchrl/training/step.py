"""`OptimStep`: loss, backward and optimizer step in one precision, without a host synchronisation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import nn
from torchrl.objectives.utils import HardUpdate, SoftUpdate, TargetNetUpdater
from torchrl.trainers import OptimizationStepper

from fp8rl_torchrl.precision.mode import Precision
from fp8rl_torchrl.training._gradients import Gradients, add_gradients
from fp8rl_torchrl.training._refusals import fits_precision, float8_must_run, parameters_of, refuse_shared
from fp8rl_torchrl.training.flat import FlatParameter, leaves_of

Schedule = Callable[[torch.Tensor], torch.Tensor]


class OptimStep(OptimizationStepper):
    """One update: the loss under autocast, scaled backward, clipping, and the optimizer's step.

    The loss runs under autocast in the precision's format; its parameters and the optimizer's moments stay FP32. A
    `torch.amp.GradScaler` scales the loss, live for ``fp16`` and present but disabled otherwise. An update whose loss
    **or** gradient is not finite is skipped: parameters, moments, target networks, learning-rate schedule and the
    count of updates all stay as they were. The decision is taken on the device, so nothing waits for the host. Among
    several optimizers only the one with the overflow skips; target networks, schedule and count wait for all of them.

    Call it with a batch, or hand it to a `torchrl.trainers.Trainer` as its ``optimization_stepper``.

    Args:
        loss: A module that maps a batch to a TensorDict whose entries ``loss*`` are scalars, such as any
            `torchrl.objectives.LossModule`. Its networks should end in FP32
            (`fp8rl_torchrl.models.Float32Head`), so that the arithmetic of the loss is FP32.
        optimizer: One **fused** optimizer (``torch.optim.Adam(..., fused=True)``) for the sum of all losses, or
            ``{loss_key: optimizer}`` with disjoint parameters, each with a loss scale of its own. Fastest is one of a
            single `fp8rl_torchrl.training.flat.FlatParameter`.
        precision: A `Precision` or its name.
        max_grad_norm: Each optimizer's gradient is clipped to this 2-norm; None leaves it as it is.
        accumulate: The optimizer steps on every ``accumulate``-th call, on the mean of the gradients.
        target_updater: A `torchrl.objectives.SoftUpdate` or ``HardUpdate`` to apply after every update that was not
            skipped; do not call its ``step`` yourself.
        every: The optimizer of a loss key steps at every so many calls only, as TD3's actor does; the others always.
        lr_schedule: Maps the number of updates so far (int64 tensor ``[]``) to a factor on every learning rate.
        compile: Whether the loss and its gradients are compiled, as one graph. The first call runs, and checks, in
            eager mode; the second one compiles, and so does each new shape of a batch.
        cudagraph: Whether whole updates are captured as a CUDA graph, after a few calls; the learning rate, the loss
            scale and all counts stay live. All batches must have one shape.

    Attributes:
        updates: int64 ``[]`` on the device, the updates applied so far.
        skipped_steps: int64 ``[]`` on the device, the updates skipped so far.
        scalers: The `torch.amp.GradScaler` of each loss key (``"loss"`` where there is one optimizer).

    Raises:
        ValueError: If there is no optimizer, one is not fused or cannot skip a step exactly, two of them share a
            parameter, a parameter is not float32, a number is out of range, a CUDA graph is asked for on a CPU or with
            ``accumulate``, or the precision is an fp8 one and the loss has no `Float8Linear` of its recipe (where the
            loss's networks cannot be seen: on the first call).
        TypeError: If the target updater is neither a ``SoftUpdate`` nor a ``HardUpdate``, or the loss, the optimizer or
            a switch is something else.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> class Loss(nn.Module):
        ...     def forward(self, batch):
        ...         return TensorDict(loss=model(batch["x"]).float().pow(2).mean())
        >>> step = OptimStep(Loss(), torch.optim.Adam(model.parameters(), fused=True), "bf16", max_grad_norm=1.0)
        >>> sorted(step(TensorDict(x=torch.ones(8, 2))).keys())
        ['grad_norm', 'loss', 'loss_scale', 'skipped']
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
        precision: Precision | str,
        *,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        target_updater: TargetNetUpdater | None = None,
        every: Mapping[str, int] | None = None,
        lr_schedule: Schedule | None = None,
        compile: bool = False,
        cudagraph: bool = False,
    ) -> None:
        if not callable(loss) or not isinstance(optimizer, torch.optim.Optimizer | Mapping):
            raise TypeError(
                "OptimStep takes a loss, then an optimizer (torch.optim.Adam(loss.parameters(), fused=True), say) or "
                f"{{loss_key: optimizer}}; got {type(loss).__name__} and {type(optimizer).__name__}"
            )
        if not isinstance(compile, bool) or not isinstance(cudagraph, bool):
            raise TypeError(f"compile and cudagraph must be True or False; got {compile!r} and {cudagraph!r}")
        self.loss = loss
        self.single = isinstance(optimizer, torch.optim.Optimizer)
        self.optimizers = {"loss": optimizer} if isinstance(optimizer, torch.optim.Optimizer) else dict(optimizer)
        self.precision = Precision.of(precision)
        self.max_grad_norm = max_grad_norm
        self.accumulate = accumulate
        self.target_updater = target_updater
        self.lr_schedule = lr_schedule
        self.every = dict(every or {})
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0, or None for no clipping; got {max_grad_norm}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be >= 1; got {accumulate}")
        if not isinstance(target_updater, SoftUpdate | HardUpdate | None):
            raise TypeError(f"target_updater must be a SoftUpdate or a HardUpdate; got {type(target_updater).__name__}")
        if not self.optimizers:
            raise ValueError("give one optimizer, or {loss_key: optimizer} with an entry for each loss; got none")
        if unknown := sorted(set(self.every) - set(self.optimizers)):
            raise ValueError(f"every names {', '.join(unknown)}; the optimizers are {', '.join(self.optimizers)}")
        if any(type(period) is not int or period < 1 for period in self.every.values()):
            raise ValueError(f"every must hold integers >= 1; got {self.every}")
        if len(self.every) == len(self.optimizers) or (self.every and (accumulate > 1 or cudagraph)):
            raise ValueError("every needs another optimizer that steps always, accumulate=1 and no CUDA graph")
        self._parameters = {key: parameters_of(key, each) for key, each in self.optimizers.items()}
        leaves = {key: leaves_of(parameters) for key, parameters in self._parameters.items()}
        refuse_shared(leaves)
        self.device = next(iter(self._parameters.values()))[0].device
        self.scalers = {
            key: torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
                self.device.type,
                init_scale=self.precision.init_scale,
                growth_interval=self.precision.growth_interval,
                enabled=self.precision.scales_loss,
            )
            for key in self.optimizers
        }
        self.updates = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self._float8_seen = fits_precision(loss, self.precision)
        self._base_lr: list[list[torch.Tensor]] = []
        if lr_schedule is not None:
            self._base_lr = [[_lr_tensor(group, self.device) for group in o.param_groups] for o in self._all()]
        if cudagraph and self.device.type != "cuda":
            raise ValueError(f"cudagraph=True needs parameters on a GPU; these are on {self.device}")
        if cudagraph and accumulate > 1:
            raise ValueError(f"cudagraph=True captures whole updates, so it needs accumulate=1; got {accumulate}")
        self.compiled, self.captured = compile, cudagraph
        self._gradients = Gradients(self.precision, self.device, leaves, self.single, accumulate, compile)
        update: Any = self._compute_and_apply
        self._captured: Any = CudaGraphModule(update) if cudagraph else None
        self._one, self._zero = torch.ones((), device=self.device), torch.zeros((), device=self.device)
        self._calls = 0
        self._finite = {key: torch.ones((), dtype=torch.bool, device=self.device) for key in self.optimizers}
        self._last_step: dict[str, torch.Tensor] = {}
        first_scale = self.precision.init_scale if self.precision.scales_loss else 1.0
        for key in self.optimizers:
            suffix = "" if self.single else f"_{key}"
            for name, value in (("grad_norm", 0.0), ("skipped", 0.0), ("loss_scale", first_scale)):
                self._last_step[name + suffix] = torch.tensor(value, device=self.device)

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Perform one update on a batch.

        Args:
            batch: What the loss takes.

        Returns:
            Device scalars, detached: everything the loss returned, and of the last optimizer step ``grad_norm``
            (before clipping), ``skipped`` (0.0 or 1.0) and ``loss_scale``; with several optimizers
            ``grad_norm_<loss key>``, ``skipped_<loss key>`` and ``loss_scale_<loss key>``. While the first
            accumulated update is under way, the first two are 0.

        Raises:
            ValueError: On the first call, if the losses and the optimizers do not fit together.
        """
        return self._update(batch, self.loss)

    def step(self, trainer: Any, sub_batch: TensorDictBase) -> TensorDict:
        """Perform one update inside a TorchRL trainer, on the trainer's loss module."""
        return self._update(sub_batch, trainer.compute_loss)

    def _all(self) -> list[torch.optim.Optimizer]:
        return list(self.optimizers.values())

    def _update(self, batch: TensorDictBase, compute_loss: Callable[[TensorDictBase], TensorDictBase]) -> TensorDict:
        if self._captured is not None and self._gradients.checked and compute_loss is self.loss:
            return self._captured(batch)
        return self._compute_and_apply(batch, compute_loss)

    def _compute_and_apply(
        self, batch: TensorDictBase, compute_loss: Callable[[TensorDictBase], TensorDictBase] | None = None
    ) -> TensorDict:
        if not self._gradients.checked:
            for parameter in self._flat():
                parameter.refuse_if_torn()
        due = [key for key in self.optimizers if self._calls % self.every.get(key, 1) == 0]
        scales = {key: self.scalers[key].scale(self._one) for key in due}
        # Where the loss's networks could not be seen beforehand, FP8 must be seen to run the first time.
        watched = contextlib.nullcontext() if self._float8_seen else float8_must_run(self.precision)
        with watched:
            outputs, finite, gradients = self._gradients(compute_loss or self.loss, batch, scales)
        self._float8_seen = True
        for key in due:
            self._finite[key] &= finite[key]
            add_gradients(self._parameters[key], gradients[key])
        self._calls += 1
        if self._calls % self.accumulate == 0:
            self._last_step = self._apply(due)
        return TensorDict({**outputs, **self._last_step}, batch_size=[])

    def _flat(self) -> list[FlatParameter]:
        return [each for parameters in self._parameters.values() for each in parameters if type(each) is FlatParameter]

    def _apply(self, due: list[str]) -> dict[str, torch.Tensor]:
        metrics: dict[str, torch.Tensor] = {}
        every_finite: list[torch.Tensor] = []
        self._set_learning_rates()
        for key, optimizer in self.optimizers.items():
            scaler, suffix = self.scalers[key], "" if self.single else f"_{key}"
            if key not in due:
                kept = {name: self._last_step[name + suffix] for name in ("grad_norm", "loss_scale")}
                metrics |= {name + suffix: value for name, value in (kept | {"skipped": self._zero}).items()}
                continue
            metrics[f"loss_scale{suffix}"] = self._scale_of(scaler)
            scaler.unscale_(optimizer)
            norm = self._clip(key)
            finite = self._finite[key] & torch.isfinite(norm)
            # GradScaler.step knows of the gradients alone, so the flag that fused optimizers obey is set here. The
            # scale still follows the gradients: an infinite reward is no reason to shrink it.
            skipped = (~finite).float()
            optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            metrics[f"grad_norm{suffix}"] = norm
            metrics[f"skipped{suffix}"] = skipped
            every_finite.append(finite)
        applied = every_finite[0] if len(every_finite) == 1 else torch.stack(every_finite).all()
        self.updates += applied
        self.skipped_steps += ~applied
        self._update_targets(applied)
        for finite in self._finite.values():  # in place, as a captured update must leave it
            finite.fill_(True)
        return metrics

    def _clip(self, key: str) -> torch.Tensor:
        """Clip the gradients of an optimizer as one vector, and return its norm before that."""
        gradients = [p.grad for p in self._parameters[key] if p.grad is not None]
        if len(gradients) == 1:  # for a flat parameter, the general functions would take longer than the arithmetic
            norm = torch.linalg.vector_norm(gradients[0])
            if self.max_grad_norm is not None:
                gradients[0].mul_((self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
            return norm
        norm = nn.utils.get_total_norm(gradients)
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters[key], self.max_grad_norm, norm)
        return norm

    def _scale_of(self, scaler: Any) -> torch.Tensor:
        # `get_scale` reads the scale on the host; the tensor itself stays on the device.
        return scaler._scale.clone() if scaler.is_enabled() else torch.ones((), device=self.device)

    def _set_learning_rates(self) -> None:
        if self.lr_schedule is not None:
            factor = self.lr_schedule(self.updates)
            for optimizer, base in zip(self._all(), self._base_lr, strict=True):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"].copy_(lr * factor)

    @torch.no_grad()
    def _update_targets(self, applied: torch.Tensor) -> None:
        """Move the target networks by the updater's rule, by nothing where the update was skipped."""
        updater: Any = self.target_updater
        if updater is None:
            return
        if isinstance(updater, SoftUpdate):
            weight = applied * (1 - updater.eps)
        else:
            weight = applied & (self.updates % int(updater.value_network_update_interval) == 0)
        sources: dict[Any, torch.Tensor] = dict(updater._sources.items(True, True))
        for key, target in updater._targets.items(True, True):
            name, *rest = key if isinstance(key, tuple) else (key,)
            source = sources[(name.removeprefix("target_"), *rest)]
            target.data.lerp_(source.data, weight.to(target.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, scalers, counters.

        Raises:
            RuntimeError: Between the calls of one accumulated update; its gradients would be lost.
        """
        if self._calls % self.accumulate:
            raise RuntimeError("an accumulated update is under way: save after its last call")
        state = {
            "optimizers": {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
            "scalers": {key: scaler.state_dict() for key, scaler in self.scalers.items()},
            "updates": self.updates,
            "skipped_steps": self.skipped_steps,
            "calls": self._calls,
        }
        # An optimizer that rests next goes on reporting its last step.
        return state | {"last_step": dict(self._last_step)} if self.every else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; gradients that wait for the rest of their update are dropped."""
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict["optimizers"][key])
            self.scalers[key].load_state_dict(state_dict["scalers"][key])
        self.updates.copy_(state_dict["updates"])
        self.skipped_steps.copy_(state_dict["skipped_steps"])
        for optimizer in self._all():
            optimizer.zero_grad(set_to_none=True)
        self._calls = state_dict.get("calls", 0)
        self._last_step |= {name: v.to(self.device).clone() for name, v in state_dict.get("last_step", {}).items()}
        for parameter in self._flat():
            parameter.refuse_if_torn()
        for finite in self._finite.values():
            finite.fill_(True)


def _lr_tensor(group: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Turn a group's learning rate into a tensor that the schedule can write, and return its first value."""
    group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
    return group["lr"].clone()
