"""`FlatParameter`: many parameters as one, so that an optimizer steps them in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


class FlatParameter(nn.Parameter):
    """One flat parameter of which others become views: what changes in one changes in the other.

    A fused optimizer spends most of a small step on its list of parameters, and so does clipping. Give the optimizer
    this one instead, and `fp8rl_torchrl.OptimStep` the optimizer; the modules keep their own parameters, with their
    names and shapes. Move the modules to their device, convert them and load their weights as you like **before**;
    afterwards, change values in place only (as ``load_state_dict`` does).

    Args:
        parameters: float32 parameters on one device, such as ``agent.parameters()``.

    Attributes:
        views: The parameters, now views of this one.

    Raises:
        ValueError: If there are none, one occurs twice or needs no gradient, or they differ in dtype or device.
        TypeError: If a module is given in place of its parameters.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> flat = FlatParameter(model.parameters())
        >>> flat.shape, torch.optim.Adam([flat], fused=True).param_groups[0]["params"][0] is flat
        (torch.Size([3]), True)
    """

    views: list[nn.Parameter]

    def __new__(cls, parameters: Iterable[nn.Parameter]) -> FlatParameter:  # noqa: D102
        if isinstance(parameters, nn.Module):
            raise TypeError(f"give the module's parameters: FlatParameter({type(parameters).__name__}.parameters())")
        views = list(parameters)
        if not views:
            raise ValueError("there are no parameters to flatten")
        if len({id(view) for view in views}) < len(views):
            raise ValueError("a parameter occurs twice; give each once")
        if any(not view.requires_grad for view in views):
            raise ValueError("a parameter is frozen; flatten only what is trained")
        kinds = {(view.dtype, view.device) for view in views}
        if len(kinds) > 1 or views[0].dtype != torch.float32:
            raise ValueError(f"all parameters must be float32 and on one device; got {sorted(map(str, kinds))}")
        flat = super().__new__(cls, torch.cat([view.detach().reshape(-1) for view in views]))
        place = 0
        for view in views:
            view.data = flat.data[place : place + view.numel()].view(view.shape)
            place += view.numel()
        flat.views = views
        return flat

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """See the class; all is done where a tensor is made."""

    def gather(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The gradients of the views as the gradient of this; zero where there is none."""
        pairs = zip(self.views, gradients, strict=True)
        return torch.cat([(torch.zeros_like(view) if g is None else g).reshape(-1) for view, g in pairs])

    def refuse_if_torn(self) -> None:
        """Make sure that the parameters are still views.

        Raises:
            RuntimeError: If one has got memory of its own, as after ``module.to(device)``: it would not be trained.
        """
        place = self.data_ptr()
        for view in self.views:
            if view.data_ptr() != place:
                raise RuntimeError(
                    "a parameter is no longer a view of its FlatParameter (was its module moved, or given new "
                    "tensors?), so it would not be trained: build the FlatParameter and its optimizer after that"
                )
            place += view.numel() * view.element_size()


def leaves_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What losses depend on: the parameters, and the views in the place of each `FlatParameter`."""
    return [leaf for p in parameters for leaf in (p.views if isinstance(p, FlatParameter) else [p])]
