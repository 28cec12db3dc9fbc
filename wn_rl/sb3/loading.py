"""Plain weights load into a parameterized policy of Stable-Baselines3, which then computes what they computed.

Such weights are those of a model without parameterization, or of one that :func:`wn_rl.fold` made plain before it was
saved. Everything that loads goes through ``load_state_dict`` (``DQN.load``, ``set_parameters``), so that is where each
layer's are turned into those of its parameterization, by hooks.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wn_rl.parameterizations import Parameterization
from wn_rl.parameterizations.api import treated_layers
from wn_rl.parameterizations.base import LAYERS, RECURRENT, Units, parameterization_of, weight_names

TOLERANCE = 1e-4
"""Largest difference of a weight that went through a parameterization, in units of the unit's length: rounding in
float32 makes some 1e-7."""


@dataclass(eq=False)
class PlainLoading:
    """What the hooks of one policy tell each other: the layers that were given plain weights last."""

    converted: set[str] = field(default_factory=set)

    def start_anew(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state that ``optimizer`` takes over: none where its parameters were plain weights.

        Moments of w say nothing about g and v. A hook of ``Optimizer.load_state_dict``.
        """
        if not self.converted:
            return None
        self.converted.clear()
        warnings.warn(
            "plain weights were loaded into a parameterized policy: its optimizer starts without moments", stacklevel=2
        )
        return {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}


@dataclass(eq=False)
class _FromPlain:
    """Turns a layer's plain weights in a state dict into those of its parameterization."""

    blank: nn.Module
    parameterization: Parameterization
    name: str
    loading: PlainLoading | None

    def convert(
        self,
        layer: nn.Module,
        state: dict[str, Any],
        prefix: str,
        _metadata: object,
        _strict: bool,
        _missing: object,
        _unexpected: object,
        errors: list[str],
    ) -> None:
        """Replace plain weights in ``state``; others are left alone. A hook of ``Module.load_state_dict``."""
        found = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        if not found or parameterization_of(layer) is None:  # a layer that was folded takes plain weights as they are
            return
        if found != set(self.blank.state_dict()):
            if self.loading is not None:
                self.loading.converted.discard(self.name)
            return
        given = {name: state.pop(f"{prefix}{name}") for name in found}
        try:
            treated = self._treated(given)
        except ValueError as error:
            errors.append(f"layer '{prefix.removesuffix('.')}': {error}.")
            treated = layer.state_dict()
        else:
            if self.loading is not None:
                self.loading.converted.add(self.name)
        state.update({f"{prefix}{name}": value for name, value in treated.items()})

    @torch.no_grad()
    def _treated(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Return the state dict of a layer with these weights after the parameterization was put on it.

        Raises:
            ValueError: they have other shapes, or no parameters of the parameterization give these weights.
        """
        parameterization = self.parameterization
        layer = copy.deepcopy(self.blank).to_empty(device="cpu").eval()
        for name, tensor in layer.state_dict().items():
            if tensor.shape != given[name].shape:
                raise ValueError(f"its {name} is of shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(given[name])
        if not parameterization.foldable:
            raise ValueError(
                f"plain weights do not load into '{parameterization.name}': no parameters of it give the same output"
            )
        parameterization.validate(layer)
        weights = {name: getattr(layer, name).clone() for name in weight_names(layer)}
        with torch.random.fork_rng(devices=[]):
            parameterization.apply(layer)
        units = Units.of(layer)
        if not parameterization.preserves_output and not isinstance(layer, RECURRENT):
            before, now = units.norm(weights["weight"]), units.norm(_folded(layer, parameterization)["weight"])
            with contextlib.suppress(TypeError):  # it has no scale: the comparison below says whether that matters
                parameterization.rescale(layer, torch.where(now > 0, before / now, 1.0).flatten())
        for name, weight in _folded(layer, parameterization).items():
            if bool((units.norm(weight - weights[name]) > TOLERANCE * units.norm(weights[name])).any()):
                raise ValueError(f"no parameters of '{parameterization.name}' give the {name} that is loaded")
        return layer.state_dict()


def _folded(layer: nn.Module, parameterization: Parameterization) -> dict[str, Tensor]:
    """Return the plain weights that a treated layer's come to."""
    plain = copy.deepcopy(layer)
    parameterization.fold(plain)
    return {name: getattr(plain, name).detach() for name in weight_names(plain)}


def blank_layers(network: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return, for each layer that may be treated, a copy without values, on the meta device; before it is treated."""
    blanks: dict[nn.Module, nn.Module] = {}
    for layer in network.modules():
        if not isinstance(layer, LAYERS):
            continue
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            for parameter in layer.parameters()
        }
        with contextlib.suppress(RuntimeError):  # torch's own parametrizations: reparameterize() refuses such a layer
            blanks[layer] = copy.deepcopy(layer, memo)
    return blanks


def refuse_after_fold(network: nn.Module) -> Callable[..., None]:
    """Return a hook before an optimizer's step that refuses it once :func:`wn_rl.fold` made layers plain.

    The optimizer holds the parameters from before, so that the weights that are used would silently stay what they are.
    """
    layers = [
        layer for layer, parameterization in treated_layers(network).values() if not parameterization.leaves_plain
    ]

    def check(*_: object) -> None:
        if any(parameterization_of(layer) is None for layer in layers):
            raise RuntimeError(
                "the policy was folded, and its optimizer holds the parameters from before: save the model and load it "
                "to train on"
            )

    return check


def accept_plain_weights(network: nn.Module, blanks: dict[nn.Module, nn.Module], loading: PlainLoading | None) -> None:
    """Let the treated layers of ``network`` take plain weights from a state dict.

    Args:
        network: with its parameterization on it.
        blanks: its layers before, by :func:`blank_layers`.
        loading: what the trained network shares with its optimizer; None for a target network.
    """
    for name, (layer, parameterization) in treated_layers(network).items():
        blank = blanks.get(layer)
        if blank is not None and not parameterization.leaves_plain:
            hook = _FromPlain(blank, parameterization, name, loading).convert
            layer.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
