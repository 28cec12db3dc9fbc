"""Put a parameterization on a model, initialize it from data, fold it into plain weights."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wn_rl.parameterizations import registry
from wn_rl.parameterizations.base import (
    LAYERS,
    RECURRENT,
    Normalization,
    OutputNormalization,
    Parameterization,
    Units,
    bias_of,
    make,
    sort_parameters,
    spatial_axes,
    tidy,
    weight_names,
)
from wn_rl.parameterizations.notes import forget_notes, note_parameterization, parameterization_of, was_taken_off
from wn_rl.parameterizations.reset import ResetParameters
from wn_rl.parameterizations.rollback import unchanged_on_failure

Model = TypeVar("Model", bound=nn.Module)
Choice = str | type[nn.Module] | nn.Module
"""Layers of a model: a name with ``*`` and ``?``, a type, or the layer itself."""


def resolve(parameterization: str | Parameterization, options: Mapping[str, Any] | None = None) -> Parameterization:
    """Return the object behind a registered name; an object is returned as it is.

    Args:
        parameterization: a registered name (``wn``, or ``module:Name`` of a class that is registered), or an object.
        options: of the parameterization, where a name is given.

    Raises:
        ValueError: no parameterization has this name, or it has no such option.
    """
    if isinstance(parameterization, Parameterization):
        if options:
            raise ValueError("options go with a name; an object has its own")
        return parameterization
    try:
        kind = registry.get(parameterization)
    except KeyError:
        known = ", ".join(registry.names())
        raise ValueError(f"unknown parameterization '{parameterization}'; there are: {known}") from None
    return make(kind, dict(options or {}))


def treated_layers(model: nn.Module) -> dict[str, tuple[nn.Module, Parameterization]]:
    """Return the layers of ``model`` that carry a parameterization, with it, by their name."""
    found = {}
    for name, module in model.named_modules():
        parameterization = parameterization_of(module)
        if parameterization is not None:
            found[name] = (module, parameterization)
    return found


def _matches(choice: Choice, name: str, module: nn.Module) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    return isinstance(module, choice) if isinstance(choice, type) else module is choice


def as_choices(choices: Choice | Iterable[Choice]) -> list[Choice]:
    """Return choices as a list; a single one need not be in a list."""
    return [choices] if isinstance(choices, str | type | nn.Module) else list(choices)


def _chosen(
    model: nn.Module, include: Choice | Iterable[Choice] | None, exclude: Choice | Iterable[Choice]
) -> dict[str, nn.Module]:
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    included = candidates if include is None else select(candidates, include)
    excluded = select(candidates, exclude)
    return {name: module for name, module in included.items() if name not in excluded}


def select(candidates: Mapping[str, nn.Module], choices: Choice | Iterable[Choice]) -> dict[str, nn.Module]:
    """Return those of ``candidates`` that a choice matches, in their order.

    Raises:
        ValueError: a choice matches none.
    """
    choices = as_choices(choices)
    for choice in choices:
        if not any(_matches(choice, name, module) for name, module in candidates.items()):
            shown = choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
            raise ValueError(f"no layer matches '{shown}'; there are: {', '.join(map(_shown, candidates)) or 'none'}")
    return {
        name: module for name, module in candidates.items() if any(_matches(choice, name, module) for choice in choices)
    }


def _shown(name: str) -> str:
    return name or "the model itself"


def reparameterize(
    model: Model,
    parameterization: str | Parameterization,
    *,
    include: Choice | Iterable[Choice] | None = None,
    exclude: Choice | Iterable[Choice] = (),
    **options: Any,  # noqa: ANN401 - those of the parameterization
) -> Model:
    """Reparameterize the Linear, convolution and recurrent layers of ``model`` in place.

    Args:
        model: any module; embeddings and other layer types are left alone.
        parameterization: a registered name, or a :class:`Parameterization`.
        include: only these layers: names with ``*`` and ``?``, types, or layers, one or several; default: all.
        exclude: not these.
        options: of the parameterization, e.g. ``g="exp"``; see its docstring.

    Returns:
        The same ``model``. Its parameters are other tensors than before: make the optimizer afterwards.

    Raises:
        ValueError: an unknown name or option, a choice that matches no layer, or a layer that this parameterization
            cannot treat. After this or any other error the model is what it was.
    """
    parameterization = resolve(parameterization, options)
    layers = _chosen(model, include, exclude)
    with unchanged_on_failure(*layers.values()):
        for layer in filter(was_taken_off, layers.values()):
            ResetParameters.give_back(layer)
            tidy(layer)
        uses = _uses(model)
        for name, layer in layers.items():
            changed = [*weight_names(layer), *(["bias"] if isinstance(parameterization, OutputNormalization) else [])]
            shared = next((part for part in changed if uses[id(layer._parameters.get(part))] > 1), None)
            if problem := _problem(parameterization, layer, shared=shared):
                kind = type(layer).__name__
                raise ValueError(f"layer '{_shown(name)}' ({kind}): {problem}; exclude= leaves a layer alone")
        for layer in layers.values():
            attach(parameterization, layer)
    return model


def attach(parameterization: Parameterization, layer: nn.Module) -> None:
    """Put ``parameterization`` on ``layer``, which it has accepted."""
    before = set(layer._modules)
    parameterization.apply(layer)
    note_parameterization(layer, parameterization, tuple(name for name in layer._modules if name not in before))
    ResetParameters.replace(layer)


def _uses(model: nn.Module) -> Counter[int]:
    """Return how many times each parameter is used in ``model``, by its ``id``."""
    parameters = (parameter for module in model.modules() for parameter in module._parameters.values())
    return Counter(id(parameter) for parameter in parameters if parameter is not None)


def _problem(parameterization: Parameterization, layer: nn.Module, *, shared: str | None) -> str:
    """Return why ``parameterization`` cannot treat ``layer``, an empty text if it can."""
    if not isinstance(layer, parameterization.layers):
        return f"'{parameterization.name}' does not treat this type"
    if shared:
        part = "bias" if shared == "bias" else "weight"
        return f"its {part} is shared with another layer, which would no longer share it"
    try:
        parameterization.validate(layer)
    except ValueError as error:
        return str(error)
    return ""


def fold(model: Model) -> Model:
    """Write every parameterization of ``model`` into plain weights and biases, in place.

    The model's output in evaluation mode stays what it was; running statistics become part of weight and bias.

    Returns:
        The same ``model``, with the state dict that it would have had without any parameterization (a layer without
        bias gains one where a mean was subtracted).

    Raises:
        ValueError: a layer's parameterization cannot be folded. After this or any other error the model is what it
            was.
    """
    treated = treated_layers(model)
    for name, (_, parameterization) in treated.items():
        if not parameterization.foldable:
            raise ValueError(
                f"layer '{_shown(name)}': '{parameterization.name}' cannot be folded: "
                "no plain weight and bias give its output"
            )
    taken_off = list(filter(was_taken_off, model.modules()))
    with unchanged_on_failure(*taken_off, *(layer for layer, _ in treated.values())):
        for layer in taken_off:
            ResetParameters.give_back(layer)
            tidy(layer)
        for layer, parameterization in treated.values():
            training = layer.training
            layer.eval()
            parameterization.fold(layer)
            layer.train(training)
            ResetParameters.give_back(layer)
            forget_notes(layer)
            sort_parameters(layer)
    return model


def project(model: nn.Module) -> None:
    """Bring the parameters of ``model`` back to where their parameterization wants them after an optimizer step.

    Only those with ``projects`` need it (``wn_projected``); for the others it does nothing.
    """
    for layer, parameterization in treated_layers(model).values():
        if parameterization.projects:
            parameterization.project(layer)


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)``, computed in the cheapest way that the layer's parameterization has."""
    parameterization = parameterization_of(layer)
    return parameterization.forward(layer, x) if parameterization is not None else layer(x)


def cannot_rescale(parameterization: Parameterization) -> str:
    """Return why it cannot be initialized from data, an empty text if it can; tried on a small layer."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(2, 2)
        try:
            parameterization.apply(layer)
            parameterization.rescale(layer, torch.ones(2))
        except (TypeError, ValueError) as error:
            return str(error)
    return ""


@dataclass(frozen=True)
class LayerInit:
    """Statistics of data-dependent initialization at one layer: mean and standard deviation of t, per output unit."""

    mean: Tensor
    std: Tensor


def _statistics(layer: nn.Module, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, standard deviation and largest magnitude of a layer's output per unit, in float32 or better."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    axes = [axis for axis in range(t.dim()) if axis != t.dim() - 1 - spatial_axes(layer)]
    return t.mean(axes), t.std(axes, correction=0), torch.linalg.vector_norm(t, torch.inf, axes)


def _rounding(layer: nn.Module, x: Tensor, largest: Tensor, stored: torch.dtype) -> Tensor:
    """Return, per output unit, the standard deviation that rounding alone can give a constant pre-activation.

    The error of a sum is about ε times the sum of its terms' magnitudes, here the unit's own Σ |w||x| at the largest x
    of each input. Products of half precision are summed in float32; only the result, up to ``largest`` per unit, is
    rounded to the ``stored`` dtype.
    """
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()  # reading a weight in training mode may change it: spectral normalization
    weight = layer.weight
    for module, training in modes:
        module.training = training
    assert isinstance(weight, Tensor)
    dtype = torch.promote_types(stored, torch.float32)
    axes = [axis for axis in range(x.dim()) if axis != x.dim() - 1 - spatial_axes(layer)]
    inputs = torch.linalg.vector_norm(x, torch.inf, axes).to(dtype)
    groups = getattr(layer, "groups", 1)
    rows = Units.of(layer).rows(weight).to(dtype).abs()
    by_input = rows.view(groups, len(rows) // groups, len(inputs) // groups, -1).sum(-1)
    summed = (by_input * inputs.view(groups, 1, -1)).sum(-1).flatten()
    rounding: Tensor = torch.finfo(dtype).eps * summed + torch.finfo(stored).eps * largest
    return rounding


@contextlib.contextmanager
def _statistics_of_one_batch(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Use the statistics of the next batch, and make them the running statistics."""
    modules = [layer.normalization for layer in layers.values() if "normalization" in layer._modules]
    normalizations = [module for module in modules if isinstance(module, Normalization)]
    before = [(normalization, normalization.training, normalization.rate) for normalization in normalizations]
    for normalization in normalizations:
        normalization.train()
        normalization.rate = 1.0
    try:
        yield
    finally:
        for normalization, training, rate in before:
            normalization.train(training)
            normalization.rate = rate


def initialize_from_data(
    model: nn.Module,
    *batch: Any,  # noqa: ANN401 - whatever the model takes
    std: float = 1.0,
    std_of: Mapping[str, float] | None = None,
) -> dict[str, LayerInit]:
    """Give every pre-activation of ``batch`` mean 0 and standard deviation ``std``, layer by layer, in one pass.

    Salimans & Kingma 2016, section 3: with t the layer's output without bias, g ← 1/σ[t] and b ← −μ[t]/σ[t];
    statistics over the batch and, in convolutions, over positions; the population standard deviation. Each layer
    sees what the layers before it give *after* their own initialization. An output unit that is constant over
    the batch, up to the rounding of its sum, keeps its scale and is only centred. Parameterizations with batch
    statistics are initialized in training mode, and their running statistics become those of ``batch``.

    Args:
        model: a model after :func:`reparameterize`, whatever its forward pass does between the layers; each
            parameterized layer needs a bias.
        batch: the arguments of the model's forward pass; 500 examples or so.
        std: the standard deviation that each pre-activation gets.
        std_of: another value for single layers, by name, e.g. ``{"output": 0.1}``.

    Returns:
        By layer name, the statistics of t that were found. Layers that the forward pass does not use are left out.

    Raises:
        ValueError: a model without parameterization, a layer without bias or with a shared parameter, a recurrent
            layer, an unknown name in ``std_of`` or a standard deviation that is not above 0; a layer used twice in the
            forward pass, values that are not finite, a single example, or a layer of ``std_of`` that the pass does not
            reach. After this or any other error the model is what it was.
        TypeError: a parameterization has no scale to initialize.
    """
    treated = treated_layers(model)
    layers = {name: layer for name, (layer, _) in treated.items()}
    targets = dict.fromkeys(layers, std) | dict(std_of or {})
    if not layers:
        raise ValueError("the model carries no parameterization: reparameterize() it first ('standard' will do)")
    if unknown := set(targets) - set(layers):
        raise ValueError(f"no treated layer is named {', '.join(sorted(unknown))}; there are: {', '.join(layers)}")
    if not all(0.0 < target < float("inf") for target in targets.values()):
        raise ValueError("a standard deviation must be a number above 0")
    uses = _uses(model)
    for name, layer in layers.items():
        if isinstance(layer, RECURRENT):
            raise ValueError(
                f"layer '{name}' is recurrent: it is used at every time step and has no one pre-activation"
            )
        if bias_of(layer) is None:
            raise ValueError(f"layer '{name}' has no bias, so its pre-activations cannot be centred")
        if shared := [key for key, parameter in layer.named_parameters() if uses[id(parameter)] > 1]:
            part = "bias" if shared[0].endswith("bias") else "weight"
            raise ValueError(f"layer '{name}': its {part} is shared with another layer, which would change with it")
    found: dict[str, LayerInit] = {}
    biases: dict[str, Tensor] = {}
    noise: dict[str, Tensor] = {}
    """Part of a standard deviation that may come from rounding."""
    handles: list[RemovableHandle] = []

    def initialize(name: str, layer: nn.Module, parameterization: Parameterization) -> None:
        # With statistics over an example's units, the rounding of one reaches the others.
        mixes_units = parameterization.batch_independent and isinstance(parameterization, OutputNormalization)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in found:
                raise ValueError(f"layer '{name}' is used twice in the forward pass")
            bias = bias_of(module)
            assert bias is not None
            biases[name] = bias.clone()
            bias.zero_()

        def unnormalized(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], t: Tensor) -> None:
            if t.dim() == 1:
                raise ValueError(f"layer '{name}' sees a single example: initialization needs a batch")
            (x, *_) = (*args, *kwargs.values())
            _, deviation, largest = _statistics(module, t)
            rounding = _rounding(module, x, largest, t.dtype)
            noise[name] = rounding.max() / t.to(deviation.dtype).std() if mixes_units else rounding / deviation

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], t: Tensor) -> Tensor:
            stored = t.dtype
            t = t.to(torch.promote_types(stored, torch.float32))
            units = t.dim() - 1 - spatial_axes(module)
            mean, deviation, _ = _statistics(module, t)
            if not bool((mean.isfinite() & deviation.isfinite()).all()):
                raise ValueError(f"layer '{name}' gives values that are not finite")
            constant = ~(deviation > noise[name] * (t.std() if mixes_units else deviation))  # true for 0 / 0 too
            factor = torch.where(constant, torch.ones_like(deviation), targets[name] / deviation)
            parameterization.rescale(module, factor)
            bias = bias_of(module)
            assert bias is not None
            bias.copy_(-mean * factor)
            found[name] = LayerInit(mean, deviation)
            shape = [-1 if axis == units else 1 for axis in range(t.dim())]
            # A constant unit is exactly 0 now; its rounding must not look like a signal to the layers behind.
            centred = torch.where(constant.view(shape), 0.0, (t - mean.view(shape)) * factor.view(shape))
            return centred.to(stored)

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(unnormalized, prepend=True, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))

    for name, (layer, parameterization) in treated.items():
        initialize(name, layer, parameterization)
    try:
        with unchanged_on_failure(model), torch.no_grad(), _statistics_of_one_batch(layers):
            model(*batch)
            if missed := set(std_of or {}) - set(found):
                raise ValueError(f"the forward pass does not reach layer {', '.join(sorted(missed))}")
    finally:
        for handle in handles:
            handle.remove()
        for name in biases.keys() - found.keys():  # the layer at which the pass ended
            bias = bias_of(layers[name])
            assert bias is not None
            with torch.no_grad():
                bias.copy_(biases[name])
    return found
