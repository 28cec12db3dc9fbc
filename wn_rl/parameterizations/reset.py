"""``reset_parameters()`` of a layer with a parameterization.

A parameterized layer has no weight of its own to initialize: what its class's ``reset_parameters()`` fills is lost. So
a plain layer of the same class is initialized instead, gets the same parameterization, and its tensors are copied.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from wn_rl.parameterizations.base import bias_of, parameter_names, weight_names
from wn_rl.parameterizations.notes import OWN, added_modules, parameterization_of
from wn_rl.parameterizations.rollback import unchanged_on_failure

_NAME = "reset_parameters"


class ResetParameters:
    """Replaces ``reset_parameters`` of a layer: initializes a plain layer, then applies the parameterization.

    The layer's tensors get new values in place: g, v and b of the new weights, gains of 1, reset statistics.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Refer to ``layer`` without keeping it alive."""
        self._layer = weakref.ref(layer)

    def __call__(self) -> None:
        """Initialize the layer's weights with the global random generator.

        Raises:
            ValueError: the parameterization refuses the new weights, or the layer has more than its parameterization;
                the layer is unchanged.
        """
        layer = self._layer()
        if layer is None:
            raise ReferenceError("the layer of this reset_parameters() is gone")
        if parameterization_of(layer) is None:
            getattr(type(layer), _NAME)(layer)  # plain again after torch's remove_parametrizations()
            return
        drawn = StandIns(device=None)
        plain = drawn.of(layer)
        getattr(type(plain), _NAME)(plain)
        drawn.start_parameterizations()
        drawn.write()

    def __reduce__(self) -> tuple[Any, ...]:
        """Refer to the copy of the layer when that is copied or pickled."""
        return type(self), (self._layer(),)

    @classmethod
    def replace(cls, layer: nn.Module) -> None:
        """Replace the layer's ``reset_parameters``, unless its parameterization leaves it plain."""
        parameterization = parameterization_of(layer)
        if parameterization is not None and not parameterization.leaves_plain and _NAME not in layer.__dict__:
            layer.__dict__[_NAME] = cls(layer)

    @classmethod
    def give_back(cls, layer: nn.Module) -> None:
        """Restore the ``reset_parameters`` of the layer's class."""
        if isinstance(layer.__dict__.get(_NAME), cls):
            del layer.__dict__[_NAME]


class StandIns:
    """Plain copies of layers and their submodules, which can be initialized before the layers themselves change."""

    def __init__(self, device: torch.device | None) -> None:
        """Choose the device of the copies; None: that of each layer."""
        self.device = device
        self.pairs: dict[nn.Module, nn.Module] = {}
        self._tensors: dict[Tensor, Tensor] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """Return the copy of ``module``: the same class and attributes, no hooks, no parameterization of ours."""
        if module in self.pairs:
            return self.pairs[module]
        treated = parameterization_of(module) is not None
        kind: type[nn.Module] = parametrize.type_before_parametrizations(module) if treated else type(module)
        plain = kind.__new__(kind)
        self.pairs[module] = plain
        nn.Module.__init__(plain)
        for key, value in module.__dict__.items():
            if key not in plain.__dict__ and not key.startswith(OWN) and not isinstance(value, ResetParameters):
                plain.__dict__[key] = list(value) if isinstance(value, list) else value
        plain.training = module.training
        plain._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        plain._parameters.update({name: self._copy(value) for name, value in _plain_parameters(module).items()})
        plain._buffers.update({name: self._copy(value) for name, value in module._buffers.items()})
        added = added_modules(module) if treated else ()
        for name, child in module._modules.items():
            if name not in added:
                plain._modules[name] = None if child is None else self.of(child)
        return plain

    def _copy(self, tensor: Tensor | None) -> Any:  # noqa: ANN401 - of the tensor's own kind
        if tensor is None or is_lazy(tensor):
            return tensor
        if tensor not in self._tensors:
            values = tensor.detach().to(self.device or tensor.device, copy=True)
            trained = isinstance(tensor, nn.Parameter) or tensor.grad_fn is not None
            self._tensors[tensor] = nn.Parameter(values, requires_grad=False) if trained else values
        return self._tensors[tensor]

    def start_parameterizations(self) -> None:
        """Put on each copy the parameterization of its layer.

        Raises:
            ValueError: one refuses the new weights, or its layer has more than its parameterization.
        """
        for module, plain in self.pairs.items():
            parameterization = parameterization_of(module)
            if parameterization is not None:
                parameterization.validate(plain)
                parameterization.apply(plain)
        for module, plain in self.pairs.items():
            added = added_modules(module)
            if _structure(module, added) != _structure(plain, added):
                raise ValueError(
                    f"a {parametrize.type_before_parametrizations(plain).__name__} has more than its "
                    "parameterization, a further parametrization or other shapes, so it cannot be reinitialized"
                )

    def write(self) -> None:
        """Copy the values of every copy to its layer's tensors, in place."""
        with torch.no_grad(), unchanged_on_failure(*self.pairs):
            for module, plain in self.pairs.items():
                added = added_modules(module)
                drawn = _tensors(plain, added)
                for key, tensor in _tensors(module, added).items():
                    tensor.copy_(drawn[key])
        for plain in self.pairs.values():  # they are in reference cycles, which would keep the tensors
            for inner in plain.modules():
                inner._parameters.clear()
                inner._buffers.clear()


def _plain_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a layer's parameters as they would be without parameterization, in the order of a plain layer."""
    if parameterization_of(module) is None:
        return dict(module._parameters)
    modes = [(inner, inner.training) for inner in module.modules()]
    try:
        for inner, _ in modes:
            inner.training = False  # reading a weight in training mode may change it: spectral normalization
        with torch.no_grad():
            slots = module._modules.get("parametrizations")
            names = (*weight_names(module), *(slots._modules if slots is not None else ()))
            computed = {name: getattr(module, name) for name in names}
    finally:
        for inner, training in modes:
            inner.training = training
    parameters: dict[str, Tensor | None] = {}
    for name in dict.fromkeys((*parameter_names(module), *names)):
        parameters[name] = nn.Parameter(computed[name]) if name in computed else module._parameters[name]
    if "bias" in parameters:
        parameters["bias"] = bias_of(module)
    return parameters


def _tensors(module: nn.Module, added: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module and of the submodules ``added`` by a parameterization, by name."""
    inside = [("", module)]
    for child in added:
        owner = module._modules.get(child)
        if owner is not None:
            inside += [(f"{child}.{name}.", inner) for name, inner in owner.named_modules()]
    return {
        f"{prefix}{name}": tensor
        for prefix, inner in inside
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items())
        if tensor is not None and not is_lazy(tensor)
    }


def _structure(module: nn.Module, added: tuple[str, ...]) -> tuple[object, ...]:
    """Return what two layers with the same parameterization have in common: submodules and shapes."""
    owners = [owner for child in added if (owner := module._modules.get(child)) is not None]
    inside = [[name for name, _ in owner.named_modules()] for owner in owners]
    return inside, {key: tensor.shape for key, tensor in _tensors(module, added).items()}
