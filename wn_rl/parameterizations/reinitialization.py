"""Reinitialize layers of a model during training, as periodic resets do (Nikishin et al. 2022)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from wn_rl.parameterizations.api import Choice, select
from wn_rl.parameterizations.base import LAYERS, weight_names
from wn_rl.parameterizations.notes import added_modules, parameterization_of
from wn_rl.parameterizations.reset import StandIns

Model = TypeVar("Model", bound=nn.Module)


def reinitialize(
    model: Model,
    seed: int,
    *,
    layers: Choice | Iterable[Choice] | None = None,
    init: Callable[[nn.Module], object] | None = None,
) -> Model:
    """Give layers of ``model`` new initial weights in place, whatever their parameterization.

    The weights are those that ``model.apply(lambda m: m.reset_parameters())`` gives the chosen layers of the same model
    without parameterization after ``torch.manual_seed(seed)``, on the CPU, whatever the model's device. Each
    parameterization starts from them as :func:`reparameterize` would: ``wn`` with g = ‖w‖ and v = w, gains at 1,
    running statistics and power iteration reset. The trained tensors stay the same objects, so an optimizer keeps
    them; remove its state of them (``optimizer.state.pop(parameter, None)``). Initialization from data is a separate
    step: call :func:`initialize_from_data` afterwards.

    Args:
        model: any module, parameterized or not.
        seed: 0 or more; the same seed gives the same weights. The global random generators are not changed.
        layers: only these: names with ``*`` and ``?``, types, or layers, one or several, among all modules that have
            ``reset_parameters()``, norms and embeddings included; default: all. ``"output"`` or ``["hidden",
            "output"]`` are the last layers of a Q-network.
        init: called with a plain copy of each chosen layer after its ``reset_parameters()``, e.g. ``lambda layer:
            torch.nn.init.orthogonal_(layer.weight)``. Default: the method ``initialize_layer`` of the nearest module
            that contains the layer and has one (a Q-network's uses its configured initialization), or nothing.

    Returns:
        The same ``model``.

    Raises:
        ValueError: a choice that matches nothing, a seed below 0, a layer without values or weights of its own, or
            (where all are reset) parameters that no ``reset_parameters()`` reaches. After this or any other error the
            model is what it was.
    """
    seed = operator.index(seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must be from 0 to 2^63 - 1, not {seed}")
    candidates = _candidates(model)
    chosen = candidates if layers is None else select(candidates, layers)
    if layers is None:
        _refuse_the_unreachable(model, candidates)
    for name, layer in chosen.items():
        if problem := _problem(layer):
            raise ValueError(f"layer '{name or 'the model itself'}' ({type(layer).__name__}): {problem}")
    initializers = {id(layer): init or _initializer(model, name) for name, layer in chosen.items()}
    drawn = StandIns(torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed() would seed the GPUs' generators as well
        for layer in _inner_first(model):
            if id(layer) in initializers:
                plain = drawn.of(layer)
                _reset_of(plain)()  # type: ignore[misc]
                if (initializer := initializers[id(layer)]) is not None:
                    with torch.no_grad():
                        initializer(plain)
        drawn.start_parameterizations()
    drawn.write()
    return model


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    """Return the method that initializes a module's parameters, None if it has none."""
    # torch's attention calls it by another name.
    name = "_reset_parameters" if isinstance(module, nn.MultiheadAttention) else "reset_parameters"
    own = hasattr(type(module), name) or name in module.__dict__  # a compiled model forwards attribute access
    method = getattr(module, name, None) if own else None
    return method if callable(method) else None


def _inner_first(model: nn.Module) -> list[nn.Module]:
    """Return all modules, each after its submodules: the order in which constructors and ``apply`` initialize."""
    ordered: dict[nn.Module, None] = {}
    for child in model.children():
        ordered.update(dict.fromkeys(_inner_first(child)))
    return [*ordered, model]


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    parts = _parts_of_parameterizations(model)
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) not in parts and _reset_of(module) is not None
    }


def _parts_of_parameterizations(model: nn.Module) -> set[int]:
    return {
        id(part)
        for layer in model.modules()
        if parameterization_of(layer) is not None
        for added in added_modules(layer)
        if added in layer._modules
        for part in layer._modules[added].modules()  # type: ignore[union-attr]
    }


def _refuse_the_unreachable(model: nn.Module, candidates: dict[str, nn.Module]) -> None:
    parts = _parts_of_parameterizations(model)
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in candidates)
        own = [key for key, value in module._parameters.items() if value is not None]
        if own and name not in candidates and id(module) not in parts and not inside:
            raise ValueError(
                f"'{name or 'the model itself'}' ({type(module).__name__}) has parameters ({', '.join(own)}) and no "
                'reset_parameters(); layers="*" reinitializes all other layers'
            )


def _problem(layer: nn.Module) -> str:
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        return "it has no weights yet (a lazy layer): run the model once before"
    if any(tensor.is_meta for tensor in tensors):
        return "it has no values on the meta device: to_empty() gives it some"
    if parameterization_of(layer) is not None:
        return ""
    if parametrize.is_parametrized(layer):
        return "it has a parametrization of torch's own, whose tensors reset_parameters() does not reach"
    if isinstance(layer, LAYERS) and any(layer._parameters.get(name) is None for name in weight_names(layer)):
        return "its weight is no parameter of its own: a hook such as torch.nn.utils.weight_norm's makes it"
    return ""


def _initializer(model: nn.Module, name: str) -> Callable[[nn.Module], object] | None:
    """Return ``initialize_layer`` of the nearest module that contains the layer called ``name``."""
    path = name.split(".") if name else []
    for length in reversed(range(len(path))):
        method = getattr(model.get_submodule(".".join(path[:length])), "initialize_layer", None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None
