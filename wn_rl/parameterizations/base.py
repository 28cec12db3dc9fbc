"""The base classes of parameterizations, and what they need to know of a layer."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from wn_rl.parameterizations import recurrent
from wn_rl.parameterizations.former_names import accept_former_names
from wn_rl.parameterizations.notes import forget_notes, remove_hook
from wn_rl.parameterizations.notes import parameterization_of as parameterization_of
from wn_rl.parameterizations.options import read_option

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *RECURRENT)
"""Layer types that :func:`wn_rl.reparameterize` treats."""
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes in which norms, means and their gradients can be computed."""


@dataclass(frozen=True)
class Units:
    """Where the output units are in a weight.

    On axis 0 for Linear, Conv and recurrent weights; on axis 1, within each group, for transposed convolutions, whose
    weight has the shape (inputs, outputs / groups, …).
    """

    transposed: bool = False
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> Units:
        """Return where the units are in the weight of ``layer``."""
        if isinstance(layer, TRANSPOSED):
            return cls(transposed=True, groups=layer.groups)
        return cls()

    def split(self, weight: Tensor) -> Tensor:
        """Return a view of ``weight`` in which every per-unit tensor broadcasts."""
        return weight.view(self.groups, -1, *weight.shape[1:]) if self.groups > 1 else weight

    def axes(self, split: Tensor) -> list[int]:
        """Return the axes of a :meth:`split` weight that are within a unit."""
        unit_axes = {0} if not self.transposed else {1} if self.groups == 1 else {0, 2}
        return [axis for axis in range(split.dim()) if axis not in unit_axes]

    def norm(self, weight: Tensor) -> Tensor:
        """Return ‖·‖ of each unit's weights, shaped to broadcast with :meth:`split`."""
        if not self.transposed:
            return torch.norm_except_dim(weight, 2, 0)
        split = self.split(weight)
        norm: Tensor = torch.linalg.vector_norm(split, dim=self.axes(split), keepdim=True)
        return norm

    def scale(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Return ``weight`` times a per-unit ``factor`` (shaped as :meth:`norm`'s result, or flat)."""
        split = self.split(weight)
        return (split * self.shaped(factor, weight)).view_as(weight)

    def shaped(self, factor: Tensor, weight: Tensor) -> Tensor:
        """Return a flat per-unit tensor in the shape of :meth:`norm`'s result."""
        split = self.split(weight)
        within = self.axes(split)
        return factor.reshape([1 if axis in within else size for axis, size in enumerate(split.shape)])

    def rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as a matrix with a row for each unit, shape (units, inputs of a unit)."""
        split = self.split(weight)
        within = self.axes(split)
        outside = [axis for axis in range(split.dim()) if axis not in within]
        rows = split.permute(*outside, *within)
        return rows.reshape(math.prod(rows.shape[: len(outside)]), -1)


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's weight tensors: ``weight``, or each of a recurrent layer's."""
    if not isinstance(layer, RECURRENT):
        return ("weight",)
    names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else ["weight_ih", "weight_hh"]
    return tuple(name for name in names if name.startswith("weight"))


def refuse_zero_weights(layer: nn.Module, *, whole: bool = False, eps: float = 0.0) -> None:
    """Refuse zero weights, for a parameterization that divides by their norm; on the meta device all pass.

    Args:
        layer: a layer that is not parameterized yet.
        whole: it divides by a norm of the whole weight, not by that of each unit.
        eps: the largest norm that counts as zero.

    Raises:
        ValueError: the norm is zero.
    """
    for name in weight_names(layer):
        weight: Tensor = getattr(layer, name).detach()
        if not weight.is_meta and bool(((weight.abs().max() if whole else Units.of(layer).norm(weight)) <= eps).any()):
            zero = f"its {name}" if whole else f"a unit of its {name}"
            more = f" (none above eps={eps:g})" if eps else ""
            raise ValueError(f"{zero} has only zero weights{more}, so its norm is zero")


def refuse_zero_length(length: Tensor, eps: float = 0.0) -> None:
    """Refuse a weight that is assigned to a layer whose parameterization divides by its norm; meta tensors pass.

    Raises:
        ValueError: a norm is not above ``eps``.
    """
    if not length.is_meta and bool((length <= eps).any()):
        raise ValueError("a unit has only zero weights, so its norm is zero")


def transformed() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is active.

    Some of torch's fused operations have no rule for it, others a rule that gives wrong second derivatives (layer and
    batch normalization in torch 2.13): these are then computed from elementary operations.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def parameter_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's parameters in the order of a plain layer."""
    first = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else weight_names(layer)
    return tuple(dict.fromkeys((*first, *layer._parameters)))


def sort_parameters(layer: nn.Module) -> None:
    """Sort a plain layer's parameters into that order, on which optimizers and ``reset_parameters`` depend."""
    ordered = {name: layer._parameters[name] for name in parameter_names(layer) if name in layer._parameters}
    layer._parameters.clear()
    layer._parameters.update(ordered)


def spatial_axes(layer: nn.Module) -> int:
    """Return how many axes follow the units' axis in a layer's output: 0 for Linear, 1 to 3 for convolutions."""
    if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
        return 1
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return 2
    return 3 if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) else 0


def units_of(layer: nn.Module) -> int:
    """Return the number of output units of a Linear or convolution."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return a parameterized layer's trained bias, wherever its parameterization keeps it."""
    normalization = layer._modules.get("normalization")
    bias = normalization.bias if normalization is not None else layer.bias
    return bias if isinstance(bias, Tensor) else None


class Parameterization:
    """One way of writing what a layer computes in terms of trained parameters.

    Subclass :class:`WeightParameterization` or :class:`OutputNormalization` (or this class), decorate the subclass
    with :func:`wn_rl.parameterizations.register`, and its name works everywhere a name is accepted. Make it a frozen
    dataclass if it has options: bool, int, float, str or ``Literal`` fields with defaults. An instance holds options,
    never a layer's state: that lives in the layer itself, so ``state_dict`` and ``deepcopy`` of the model carry it.
    """

    name: ClassVar[str] = ""
    """Set by :func:`register`."""

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 - those of a subclass's own bases
        """Accept what a subclass overrides under its former name."""
        super().__init_subclass__(**options)
        accept_former_names(cls, Parameterization)

    batch_independent: ClassVar[bool] = True
    """Whether, in training mode, an example's output is independent of the other examples of the minibatch."""

    data_dependent_init: ClassVar[bool] = False
    """Whether its source initializes it from data (Salimans & Kingma 2016, section 3)."""

    has_training_mode: ClassVar[bool] = False
    """Whether a forward pass in training mode differs from one in evaluation mode, or changes a buffer."""

    preserves_output: ClassVar[bool] = True
    """Whether putting it on a layer leaves the layer's output in evaluation mode as it was."""

    foldable: ClassVar[bool] = False
    """Whether :func:`wn_rl.fold` can write it as a plain weight and bias (in evaluation mode)."""

    leaves_plain: ClassVar[bool] = False
    """Whether a parameterized layer stays an ordinary one, so that another parameterization may replace this one."""

    projects: ClassVar[bool] = False
    """Whether :func:`wn_rl.project` must follow every optimizer step."""

    default_layers: ClassVar[Literal["all", "hidden", "penultimate"]] = "all"
    """Layers of a Q-network that have it by default: all, all but the output layer, or the one before the output."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = LAYERS
    """Layer types that it supports."""

    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = REAL
    """Dtypes of a weight that it supports, None for any."""

    def validate(self, layer: nn.Module) -> None:
        """Refuse a layer that it does not support.

        Raises:
            ValueError: what is wrong with the layer; the message does not name the layer.
        """
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in layer.parameters()):
            raise ValueError("it has no weights yet (a lazy layer): run the model once before")
        before = parameterization_of(layer)
        if (before is not None and not before.leaves_plain) or parametrize.is_parametrized(layer):
            raise ValueError(
                "it is parametrized already; fold() takes a parameterization of this library off, "
                "torch.nn.utils.parametrize.remove_parametrizations() one of torch's own"
            )
        if any(layer._parameters.get(name) is None for name in weight_names(layer)):
            raise ValueError(
                "its weight is no parameter of its own: a hook such as torch.nn.utils.weight_norm's makes it"
            )
        for name in weight_names(layer):
            weight = getattr(layer, name)
            if self.dtypes is not None and weight.dtype not in self.dtypes:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
                raise ValueError(f"its weight is {weight.dtype}; '{self.name}' treats {known}")

    def apply(self, layer: nn.Module) -> None:
        """Reparameterize ``layer``, which :meth:`validate` has accepted, in place."""
        raise TypeError(f"{type(self).__name__} does not define apply()")

    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply what the layer computes, its bias aside, by ``factor`` per output unit, in place.

        Data-dependent initialization uses it to give each pre-activation its scale.

        Args:
            layer: a layer that :meth:`apply` has treated.
            factor: positive, shape ``(output units,)``, the weight's dtype and device.
        """
        raise TypeError(f"'{self.name or type(self).__name__}' has no scale to initialize from data")

    def fold(self, layer: nn.Module) -> None:
        """Undo :meth:`apply` in place, with a plain weight and bias that give the same output."""
        raise TypeError(f"{type(self).__name__} does not define fold()")

    def project(self, layer: nn.Module) -> None:
        """Project the layer's parameters back onto their constraint after an optimizer step."""

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the layer's output; a parameterization may have a cheaper way than ``layer(x)`` to the same values."""
        output: Tensor = layer(x)
        return output

    def options(self) -> dict[str, Any]:
        """Return the options of this instance."""
        return {option.name: getattr(self, option.name) for option in option_fields(type(self))}


def option_fields(kind: type[Parameterization]) -> tuple[Any, ...]:
    """Return the dataclass fields of a parameterization's options, none for a class without."""
    return fields(kind) if hasattr(kind, "__dataclass_fields__") else ()  # type: ignore[arg-type]


def make(kind: type[Parameterization], options: dict[str, Any]) -> Parameterization:
    """Build a parameterization from options, which are checked.

    Args:
        kind: the class.
        options: by name; a text is parsed as the option's type.

    Raises:
        ValueError: an unknown option, or a value that it cannot take.
    """
    known = {field.name for field in option_fields(kind)}
    hints = get_type_hints(kind)
    for name in options:
        if name not in known:
            there = f"there are: {', '.join(sorted(known))}" if known else "it has none"
            raise ValueError(f"the parameterization '{kind.name}' has no option '{name}'; {there}")
    for field in option_fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in options:
            raise ValueError(f"the parameterization '{kind.name}' needs the option '{field.name}'")
    return kind(**{name: read_option(hints[name], name, value) for name, value in options.items()})


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse an option outside its range.

    Raises:
        ValueError: it is; NaN is outside every range.
    """
    if not low <= value <= high:
        raise ValueError(f"the option {name} must be from {low:g} to {high:g}, not {value:g}")


def tidy(layer: nn.Module) -> None:
    """Make a layer ordinary again after torch's ``remove_parametrizations``.

    That leaves hooks and attributes behind, and the weight of a frozen layer as a buffer.
    """
    forget_notes(layer)
    for name in weight_names(layer):
        if name in layer._buffers:
            weight = layer._buffers.pop(name)
            assert weight is not None
            layer.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=False))
    if isinstance(layer, nn.RNNBase):
        _keep_flat_weights(layer)
    sort_parameters(layer)


class WeightParameterization(Parameterization):
    """A parameterization that computes the weight itself, through ``torch.nn.utils.parametrize``.

    A subclass returns the module that computes w (:meth:`make_parametrization`): its ``forward`` takes the trained
    tensors, its ``right_inverse`` returns them for a weight. In recurrent layers each weight matrix is parameterized.
    """

    foldable = True

    def make_parametrization(self, units: Units, weight: Tensor) -> nn.Module:
        """Return the module that computes a weight of the shape of ``weight``."""
        raise TypeError(f"{type(self).__name__} does not define make_parametrization()")

    def apply(self, layer: nn.Module) -> None:
        """Register the parametrization of each weight of ``layer``."""
        for name in weight_names(layer):
            weight = getattr(layer, name)
            parametrize.register_parametrization(layer, name, self.make_parametrization(Units.of(layer), weight))
        if isinstance(layer, nn.RNNBase):
            recurrent.keep_no_weights(layer)

    def fold(self, layer: nn.Module) -> None:
        """Replace the parametrizations by plain parameters with the present weights."""
        for name in weight_names(layer):
            if parametrize.is_parametrized(layer, name):  # torch's remove_parametrizations() may have been here
                _make_plain(layer, name)
        if isinstance(layer, nn.RNNBase):
            _keep_flat_weights(layer)


def _make_plain(layer: nn.Module, name: str) -> None:
    """Replace a parametrized weight by a parameter with its present value.

    ``parametrize.remove_parametrizations`` deletes the weight's property from the layer's class, which ``deepcopy``
    shares between copies, so folding a copy would break the original.
    """
    with torch.no_grad():
        weight = getattr(layer, name).detach().clone()
    parametrizations = layer.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    trained = any(parameter.requires_grad for parameter in parametrizations[name].parameters())
    del parametrizations[name]
    shared = type(layer)
    if len(parametrizations) == 0:
        del layer.parametrizations
        layer.__class__ = shared.__bases__[0]
    else:
        kept = {key: value for key, value in vars(shared).items() if key not in (name, "__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, kept)
    layer.register_parameter(name, nn.Parameter(weight, requires_grad=trained))


def _keep_flat_weights(layer: nn.RNNBase) -> None:
    """Let a recurrent layer store its weights in its list again."""
    remove_hook(layer._forward_pre_hooks, recurrent.collect_weights)
    remove_hook(layer._forward_hooks, recurrent.forget_weights)
    if "_flat_weights" in layer.__dict__ or "_flat_weights" not in vars(type(layer)):
        layer._init_flat_weights()


class Normalization(nn.Module):
    """The module that an :class:`OutputNormalization` puts after a layer; its input is t, the output without bias.

    Attributes:
        bias: the layer's bias, moved here, or None.
        spatial_axes: axes after the units' axis.
        rate: weight of a new minibatch in running statistics, where there are any.
    """

    bias: nn.Parameter | None

    def __init__(self, bias: nn.Parameter | None, spatial_axes: int, rate: float = 0.0) -> None:
        """Take over the layer's bias."""
        super().__init__()
        self.register_parameter("bias", bias)
        self.spatial_axes = spatial_axes
        self.rate = rate

    def unit_axis(self, t: Tensor) -> int:
        """Return the axis of ``t`` on which the units lie."""
        return t.dim() - 1 - self.spatial_axes

    def other_axes(self, t: Tensor) -> list[int]:
        """Return every axis of ``t`` but the units'."""
        return [axis for axis in range(t.dim()) if axis != self.unit_axis(t)]

    def along_units(self, per_unit: Tensor, t: Tensor) -> Tensor:
        """Return ``per_unit``, shape (units,), shaped to broadcast with ``t``."""
        return per_unit.view([1 if axis != self.unit_axis(t) else -1 for axis in range(t.dim())])

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), each of shape (units,), to which this is equal in evaluation mode."""
        raise TypeError(f"{type(self).__name__} is not a fixed scale and shift")

    def rescale(self, factor: Tensor) -> None:
        """Multiply the output, its bias aside, by ``factor`` per unit; the layer before it is left alone."""
        raise TypeError(f"{type(self).__name__} has no scale")


def normalize_output(layer: nn.Module, _inputs: object, t: Tensor) -> Tensor:
    """Return what the normalization of ``layer`` makes of its output: a forward hook."""
    return layer.normalization(t)  # type: ignore[operator,no-any-return]


class OutputNormalization(Parameterization):
    """A parameterization that normalizes what a layer computes, before bias and nonlinearity.

    The layer gets a submodule ``normalization``, which holds its bias from then on, and a forward hook that calls it.
    A recurrent layer does not show its pre-activations and is refused.
    """

    foldable = True
    layers = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)

    def normalization(self, layer: nn.Module, bias: nn.Parameter | None) -> Normalization:
        """Return the module that normalizes the output of ``layer``."""
        raise TypeError(f"{type(self).__name__} does not define normalization()")

    def validate(self, layer: nn.Module) -> None:
        """Refuse recurrent layers, and those whose parent reads the weight instead of calling them."""
        super().validate(layer)
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            raise ValueError("it is part of an attention that never calls it, so its output cannot be normalized")
        if "normalization" in layer._modules:
            raise ValueError("it has a submodule 'normalization' already")

    def apply(self, layer: nn.Module) -> None:
        """Move the bias into the normalization, and call that in a forward hook."""
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        layer.register_parameter("bias", None)
        weight = next(layer.parameters())
        normalization = self.normalization(layer, bias).to(weight.device)
        normalization.train(layer.training)
        layer.add_module("normalization", normalization)
        layer.register_forward_hook(normalize_output)

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply the normalization's gain."""
        normalization = layer.normalization
        assert isinstance(normalization, Normalization)
        normalization.rescale(factor)

    @torch.no_grad()
    def fold(self, layer: nn.Module) -> None:
        """Write scale and shift of evaluation mode into the layer's weight and bias."""
        normalization = layer.normalization
        assert isinstance(normalization, Normalization)
        scale, shift = normalization.plain()
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        trained = weight if normalization.bias is None else normalization.bias
        remove_hook(layer._forward_hooks, normalize_output)
        del layer._modules["normalization"]
        # New parameters: other layers may have come to share the old ones.
        weight_now = Units.of(layer).scale(weight, scale.to(weight.dtype))
        shift_now = shift.to(trained.dtype, copy=True)
        layer.register_parameter("weight", nn.Parameter(weight_now, requires_grad=weight.requires_grad))
        layer.register_parameter("bias", nn.Parameter(shift_now, requires_grad=trained.requires_grad))
