"""Put a parameterization on a model, and initialize it from data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wn_rl.parameterizations import registry
from wn_rl.parameterizations.base import LAYERS, Parameterization


def resolve(parameterization: str | Parameterization) -> Parameterization:
    """Return the object behind a registered name; an object is returned as it is.

    Raises:
        ValueError: no parameterization has this name.
    """
    if isinstance(parameterization, Parameterization):
        return parameterization
    try:
        return registry.get(parameterization)()
    except KeyError:
        known = ", ".join(registry.names())
        raise ValueError(f"unknown parameterization '{parameterization}'; there are: {known}") from None


def treated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a parameterization applies to, by their name in ``model``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def reparameterize(model: nn.Module, parameterization: str | Parameterization) -> nn.Module:
    """Reparameterize every Linear and Conv layer of ``model`` in place; its output does not change.

    Args:
        model: any module; embeddings and other layer types are left alone.
        parameterization: a registered name, or a :class:`Parameterization`.

    Returns:
        The same ``model``.

    Raises:
        ValueError: an unknown name.
    """
    entry = resolve(parameterization)
    for layer in treated_layers(model).values():
        entry.apply(layer)
    return model


def _rounding(layer: nn.Module, x: Tensor) -> Tensor:
    """Return, per output unit, what rounding alone can make of the deviation of a constant pre-activation."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return torch.finfo(x.dtype).eps * weight.abs().flatten(1).sum(1) * x.abs().max()


@dataclass(frozen=True)
class LayerInit:
    """What data-dependent initialization saw at one layer: mean and standard deviation of t, per output unit."""

    mean: Tensor
    std: Tensor


def initialize_from_data(
    model: nn.Module,
    parameterization: str | Parameterization,
    batch: Tensor,
    *,
    std: float = 1.0,
    std_of: Mapping[str, float] | None = None,
) -> dict[str, LayerInit]:
    """Give every pre-activation of ``batch`` mean 0 and standard deviation ``std``, layer by layer, in one pass.

    Salimans & Kingma 2016, section 3: with t the layer's output without bias, g ← 1/σ[t] and b ← −μ[t]/σ[t];
    statistics over the batch and, in convolutions, over positions; the population standard deviation. Each layer
    sees what the layers before it give *after* their own initialization. An output unit that is constant over
    the batch keeps its scale and is only centred.

    Args:
        model: a model that ``parameterization`` was applied to; each treated layer needs a bias.
        parameterization: the entry on the model.
        batch: the input of ``model``; its first axis is the batch.
        std: the standard deviation that each pre-activation gets.
        std_of: another value for single layers, by name, e.g. ``{"output": 0.1}``.

    Returns:
        By layer name, the statistics of t that were found.

    Raises:
        ValueError: a layer without bias or an unknown name in ``std_of`` (nothing was changed); a layer used twice in
            the forward pass (those before it are initialized), or one of ``std_of`` that it does not reach.
    """
    entry = resolve(parameterization)
    layers = treated_layers(model)
    targets = dict.fromkeys(layers, std) | dict(std_of or {})
    if unknown := set(targets) - set(layers):
        raise ValueError(f"no layer is named {', '.join(sorted(unknown))}; there are: {', '.join(layers)}")
    for name, layer in layers.items():
        if not isinstance(layer.bias, Tensor):
            raise ValueError(f"layer '{name}' has no bias, so its pre-activations cannot be centred")
    found: dict[str, LayerInit] = {}
    handles: list[RemovableHandle] = []

    def initialize(name: str, layer: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in found:
                raise ValueError(f"layer '{name}' is used twice in the forward pass")
            assert isinstance(module.bias, Tensor)
            module.bias.zero_()

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], t: Tensor) -> Tensor:
            (x,) = (*args, *kwargs.values())
            units = 1 if not isinstance(module, nn.Linear) else t.dim() - 1
            axes = [axis for axis in range(t.dim()) if axis != units]
            mean = t.mean(axes)
            deviation = t.std(axes, correction=0)
            constant = deviation <= _rounding(module, x)
            factor = torch.where(constant, torch.ones_like(deviation), targets[name] / deviation)
            entry.rescale(module, factor)
            bias = module.bias
            assert isinstance(bias, Tensor)
            bias.copy_(-mean * factor)
            found[name] = LayerInit(mean, deviation)
            shape = [-1 if axis == units else 1 for axis in range(t.dim())]
            return (t - mean.view(shape)) * factor.view(shape)

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))

    for name, layer in layers.items():
        initialize(name, layer)
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if missed := set(std_of or {}) - set(found):
        raise ValueError(f"the forward pass does not reach layer {', '.join(sorted(missed))}")
    return found
