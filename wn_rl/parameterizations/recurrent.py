"""Recurrent layers whose weights a parameterization computes."""

from __future__ import annotations

import threading
import weakref

from torch import Tensor, nn


class _Passes(threading.local):
    """The computed weights of each recurrent layer whose forward pass is running in this thread."""

    def __init__(self) -> None:
        self.weights: weakref.WeakKeyDictionary[nn.Module, list[Tensor | None]] = weakref.WeakKeyDictionary()


_passes = _Passes()


def keep_no_weights(layer: nn.RNNBase) -> None:
    """Let a recurrent layer store its computed weights only during a forward pass, separately for each thread.

    ``nn.RNNBase`` keeps its weights in a list. Parametrized weights are results of a computation: ``deepcopy`` refuses
    to copy them, they would keep the graph alive, and threads that share the layer would use each other's.
    """
    own = type(layer)  # its own class since it is parametrized; shared with its copies
    attributes = {
        "_flat_weights": property(_flat_weights, lambda layer, value: None),
        "_init_flat_weights": _outdate_flat_weights,  # .to() calls it
        "_weights_have_changed": lambda layer: False,  # torch's computes each weight twice to find out
    }
    for name, value in attributes.items():
        setattr(own, name, value)
    layer.__dict__.pop("_flat_weights", None)
    _outdate_flat_weights(layer)
    layer.register_forward_pre_hook(collect_weights)
    layer.register_forward_hook(forget_weights, always_call=True)


def _flat_weights(layer: nn.RNNBase) -> list[Tensor | None]:
    weights = _passes.weights.get(layer)
    return [None for _ in layer._flat_weights_names] if weights is None else weights


def collect_weights(layer: nn.RNNBase, _inputs: object) -> None:
    """Compute a recurrent layer's weights for one forward pass."""
    _passes.weights[layer] = [getattr(layer, name) for name in layer._flat_weights_names]


def forget_weights(layer: nn.RNNBase, *_: object) -> None:
    """Drop them after the forward pass, also if it failed."""
    _passes.weights.pop(layer, None)


def _outdate_flat_weights(layer: nn.RNNBase) -> None:
    """Let a layer that becomes plain again, in whatever way, collect its weights at the next forward pass."""
    layer._flat_weight_refs = [_gone for _ in layer._flat_weights_names]  # type: ignore[misc]


def _gone() -> None:
    """Stand for a reference to a weight that no longer exists."""
