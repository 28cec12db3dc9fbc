"""One update on a CPU with as few passes over memory as it takes: the same arithmetic as autograd's, written out.

What is trained stays in float32 where the network has it. Beside it lies a *working* copy of each weight w, in the
precision and in the order in which the CPU computes fastest: convolutions channels last, the first one on blocks of
pixels (:class:`wn_rl.networks.FirstConvolution`) with the division by 255 in its weights. One compiled pass per update
takes the working weights' gradients, turns them into those of what is trained (v and g of weight normalization), makes
the Adamax step and writes the next working weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wn_rl.networks import FirstConvolution, QNetwork
from wn_rl.parameterizations.base import entry_of
from wn_rl.parameterizations.standard import Standard
from wn_rl.parameterizations.weight_norm import WeightNormalization, direction_and_scale
from wn_rl.replay import Minibatch

from ...optimizers import CompiledAdamax
from . import loader

aten = torch.ops.aten


@dataclass
class Working:
    """The weights that passes compute with.

    Attributes:
        weights: from input to output; convolutions (units, channels, k, k) channels last, dense ones (units, inputs).
        biases: (units,), of the weight's dtype. The output layer's are float32, the others in the passes' precision.
    """

    weights: list[Tensor]
    biases: list[Tensor]


@dataclass
class _Layer:
    """A layer of the network with what is trained: v (w itself where ``g`` is None), g and b."""

    module: nn.Module
    v: nn.Parameter
    g: nn.Parameter | None
    b: nn.Parameter
    order: Tensor | None
    factor: float
    low: bool
    weight_gradient: Tensor | None = None
    bias_gradient: Tensor | None = None


def unsupported(network: QNetwork) -> str:
    """Return why ``network`` cannot be trained this way, an empty text if it can."""
    layers = [*network.convolutions, network.hidden, network.output]
    for layer in layers:
        entry = entry_of(layer)
        plain = entry is None or type(entry) is Standard
        if not plain and not (type(entry) is WeightNormalization and entry.g == "direct"):
            assert entry is not None
            return f"its parameterization is '{entry.name}'"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "a layer has hooks"
    if any(p.device.type != "cpu" or p.dtype != torch.float32 or not p.is_contiguous() for p in network.parameters()):
        return "its parameters are not contiguous float32 on the CPU"
    first = next(iter(network.convolutions), None)
    observation = torch.zeros(1, *network.spec.observation_shape, dtype=torch.uint8)
    if not isinstance(first, FirstConvolution) or not first.packs(observation):
        return "its first convolution does not fit blocks of pixels"
    return ""


class FusedNetwork:
    """A Q-network's forward and backward pass over working weights.

    A change of the network's parameters by somebody else is noticed by their version, so :meth:`q_values` is always
    that of the network.
    """

    def __init__(self, network: QNetwork, library: ctypes.CDLL, *, precision: torch.dtype) -> None:
        """Make working weights.

        Args:
            network: one that :func:`unsupported` has nothing against.
            library: what :func:`agents.backends.cpu_kernels.loader.load` returned.
            precision: of the hidden layers, float32 or bfloat16.
        """
        self.network = network
        self.library = library
        self.precision = precision
        # The first convolution sees blocks of stride × stride pixels and visits each.
        self.block, *others = (stride for _, _, stride in network.spec.convolutions)
        self.strides = [1, *others]
        self.layers = [self._layer(module) for module in (*network.convolutions, network.hidden, network.output)]
        self.structs = (loader.LayerStruct * len(self.layers))()
        self._prepare()
        self.g_gradients = [torch.zeros(len(layer.v)) for layer in self.layers]
        self._norms = [torch.zeros(len(layer.v)) for layer in self.layers]
        self._trained = [p for layer in self.layers for p in (layer.v, layer.g, layer.b) if p is not None]
        self._versions: list[int] = []
        for index, layer in enumerate(self.layers):
            self._describe(self.structs[index], index, layer)

    def _prepare(self) -> None:
        """Make room for working weights and gradients."""
        self._rows = torch.empty(0)
        self.working = Working([self._weight_like(layer) for layer in self.layers], [])
        self.working.biases = [torch.empty(len(weight), dtype=weight.dtype) for weight in self.working.weights]
        # A gradient that stands in another order than v needs a place of its own.
        self.v_gradients = [None if layer.order is None else torch.zeros_like(layer.v) for layer in self.layers]

    def _layer(self, module: nn.Module) -> _Layer:
        g: Tensor | None = None
        if isinstance(entry_of(module), WeightNormalization):
            v, g = direction_and_scale(module)
        else:
            v = module.weight  # type: ignore[assignment]
        b = module.bias
        assert isinstance(v, nn.Parameter)
        assert isinstance(b, nn.Parameter)
        assert g is None or isinstance(g, nn.Parameter)
        order = None
        if isinstance(module, nn.Conv2d):
            places = torch.arange(v[0].numel()).view(1, *v.shape[1:])
            arranged = _arranged(module, places).flatten()
            order = torch.empty(len(arranged), dtype=torch.int32)
            order[arranged] = torch.arange(len(arranged), dtype=torch.int32)
        factor = 1 / 255 if isinstance(module, FirstConvolution) else 1.0
        low = module is not self.network.output and self.precision is torch.bfloat16
        return _Layer(module, v, g, b, order, factor, low)

    def _weight_like(self, layer: _Layer) -> Tensor:
        """Return memory for a working weight."""
        dtype = torch.bfloat16 if layer.low else torch.float32
        if isinstance(layer.module, nn.Conv2d):
            return torch.empty(_arranged(layer.module, layer.v).shape, dtype=dtype).permute(0, 3, 1, 2)
        return torch.empty(layer.v.shape, dtype=dtype)

    def _describe(self, struct: Any, index: int, layer: _Layer) -> None:  # noqa: ANN401 - ctypes sets its fields
        struct.units, struct.inputs = len(layer.v), layer.v[0].numel()
        struct.normalized, struct.low, struct.factor = layer.g is not None, layer.low, layer.factor
        addresses = {
            "v": layer.v,
            "g": layer.g,
            "b": layer.b,
            "g_gradient": self.g_gradients[index],
            "v_gradient": self.v_gradients[index],
            "norm": self._norms[index],
        }
        for name, tensor in (addresses | self._arrangement(struct, index, layer)).items():
            setattr(struct, name, None if tensor is None else tensor.data_ptr())

    def _arrangement(self, struct: Any, index: int, layer: _Layer) -> dict[str, Tensor | None]:  # noqa: ANN401 - see above
        """Set where working weights and their gradients have their elements; returns the tensors to point at."""
        struct.unit_step = struct.gradient_unit_step = struct.inputs
        struct.low_gradient = layer.low
        struct.low_kept = layer.low and layer.order is None
        weight, bias = self.working.weights[index], self.working.biases[index]
        return {"place": layer.order, "gradient_place": layer.order, "work": weight, "bias": bias}

    def refresh(self) -> None:
        """Make the working weights anew if somebody else has changed what is trained."""
        versions = [parameter._version for parameter in self._trained]
        if versions != self._versions:
            self.library.renew_layers(self.structs, len(self.layers), torch.get_num_threads())
            self._versions = versions

    @torch.no_grad()
    def working_copy(self, plain: QNetwork) -> Working:
        """Return working weights of a network of the same shape without parameterization, a folded target network."""
        copied = Working([], [])
        layers = (*plain.convolutions, plain.hidden, plain.output)
        for module, layer, weight in zip(layers, self.layers, self.working.weights, strict=True):
            w, b = module.weight, module.bias
            assert isinstance(w, Tensor)
            assert isinstance(b, Tensor)
            arranged = _arranged(module, w).permute(0, 3, 1, 2) if isinstance(module, nn.Conv2d) else w
            copied.weights.append(torch.empty_like(weight).copy_(arranged * layer.factor))
            copied.biases.append(b.to(weight.dtype, copy=True))
        return copied

    def packed(self, observations: Tensor) -> Tensor:
        """Return uint8 observations, (B, C, H, W), as the first layer takes them: (B, C·s², H/s, W/s)."""
        if observations.stride()[-2:] != (observations.shape[-1], 1):
            observations = observations.contiguous()
        batch, channels, height, width = observations.shape
        size = self.block
        shape = (batch, height // size, width // size, channels * size * size)
        blocks = torch.empty(shape, dtype=self.precision)
        self.library.pack(
            observations.data_ptr(),
            observations.stride(0),
            observations.stride(1),
            batch,
            channels,
            height,
            width,
            size,
            self.precision is torch.bfloat16,
            torch.get_num_threads(),
            blocks.data_ptr(),
        )
        return blocks.permute(0, 3, 1, 2)

    @torch.no_grad()
    def forward(self, working: Working, observations: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return Q-values, float32 (B, actions), and what each layer saw, for :meth:`backward`."""
        x = self.packed(observations)
        seen = []
        last = len(working.weights) - 3
        for index, stride in enumerate(self.strides):
            seen.append(x)
            x = torch.conv2d(x, working.weights[index], working.biases[index], stride)
            x = (x.flatten(1) if index == last else x).relu_()
        seen.append(x)
        x = torch.addmm(working.biases[-2], x, working.weights[-2].t()).relu_().float()
        seen.append(x)
        return torch.addmm(working.biases[-1], x, working.weights[-1].t()), seen

    def compare(self, target: Working, batch: Minibatch) -> tuple[Tensor, Tensor, Any]:
        """Return the Q-values of the target network and of this one, and what its layers saw."""
        next_q_values, _ = self.forward(target, batch.next_observations)
        return (next_q_values, *self.forward(self.working, batch.observations))

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations."""
        self.refresh()
        return self.forward(self.working, observations)[0]

    @torch.no_grad()
    def backward(self, seen: Any, q_gradient: Tensor) -> None:  # noqa: ANN401 - what forward returned
        """Leave the working weights' gradients for :meth:`step`, given the loss's by the Q-values, (B, actions)."""
        *inputs, flat, hidden = seen
        weights, layers = self.working.weights, self.layers
        layers[-1].weight_gradient = q_gradient.t() @ hidden
        layers[-1].bias_gradient = q_gradient.sum(0)
        dy = aten.threshold_backward((q_gradient @ weights[-1]), hidden, 0).to(self.precision)
        layers[-2].weight_gradient = dy.t() @ flat
        layers[-2].bias_gradient = dy.sum(0)
        dy = aten.threshold_backward(dy @ weights[-2], flat, 0)
        size = round((flat.shape[1] / weights[-3].shape[0]) ** 0.5)
        dy = dy.view(len(dy), -1, size, size)
        for index in reversed(range(len(inputs))):
            x, weight, stride = inputs[index], weights[index], self.strides[index]
            wanted = [index > 0, True, True]
            dx, dw, db = aten.convolution_backward(
                dy.contiguous(memory_format=torch.channels_last),
                x,
                weight,
                [len(weight)],
                [stride, stride],
                [0, 0],
                [1, 1],
                False,
                [0, 0],
                1,
                wanted,
            )
            layers[index].weight_gradient = dw.contiguous(memory_format=torch.channels_last)
            layers[index].bias_gradient = db
            if index > 0:
                dy = aten.threshold_backward(dx, x, 0)

    def step(self, rate: float, betas: tuple[float, float], eps: float) -> None:
        """Make an Adamax step of everything, ``rate`` being without the bias of the first moment."""
        threads = torch.get_num_threads()
        longest = max(layer.v[0].numel() for layer in self.layers)
        if self._rows.numel() < threads * longest:
            self._rows = torch.empty(threads * longest)
        for struct, layer in zip(self.structs, self.layers, strict=True):
            assert layer.weight_gradient is not None
            assert layer.bias_gradient is not None
            struct.gradient, struct.bias_gradient = layer.weight_gradient.data_ptr(), layer.bias_gradient.data_ptr()
        rows = self._rows.data_ptr()
        self.library.step_layers(self.structs, len(self.layers), threads, rows, longest, rate, *betas, eps)

    def write_gradients(self, moments: Callable[[nn.Parameter], Mapping[str, Tensor]], rate: float) -> None:
        """Write the gradients of the last step to ``.grad``.

        Args:
            moments: returns a parameter's, by torch's names, as they are after the step.
            rate: that of the step.
        """
        for layer, v_gradient, g_gradient in zip(self.layers, self.v_gradients, self.g_gradients, strict=True):
            assert layer.weight_gradient is not None
            assert layer.bias_gradient is not None
            # Without a place of its own it was completed in the place of the working weight's.
            layer.v.grad = (layer.weight_gradient if v_gradient is None else v_gradient).float()
            layer.b.grad = layer.bias_gradient.float()
            if layer.g is not None:
                layer.g.grad = g_gradient.view_as(layer.g).clone()


def _arranged(module: nn.Conv2d, weight: Tensor) -> Tensor:
    """Return a convolution's weight as (units, k, k, channels) of its working one."""
    if not isinstance(module, FirstConvolution):
        return weight.permute(0, 2, 3, 1)
    return module.blocks(weight)


class FusedAdamax(CompiledAdamax):
    """Adamax as one compiled pass over the layers of a :class:`FusedNetwork`.

    Same state dict as torch's, same values but for rounding. Gradients are written to ``.grad`` by
    :meth:`write_gradients` only, since nothing but a report needs them.
    """

    def __init__(self, fused: FusedNetwork, lr: float, betas: tuple[float, float], eps: float) -> None:
        """Make the optimizer of all that ``fused`` trains; arguments as :class:`CompiledAdamax`."""
        super().__init__(fused.network.parameters(), lr, betas, eps)
        self._fused = fused
        self._bound = False
        self._made = False
        self._rate = 0.0

    def _bind(self) -> None:
        """Tell the compiled pass where the moments are."""
        for struct, layer in zip(self._fused.structs, self._fused.layers, strict=True):
            for name in ("v", "g", "b"):
                parameter = getattr(layer, name)
                if parameter is None:
                    continue
                state = self._moments(parameter)
                for key, field in (("exp_avg", "mean"), ("exp_inf", "max")):
                    state[key] = state[key].contiguous()
                    setattr(struct, f"{name}_{field}", state[key].data_ptr())
        self._bound = True

    def next_steps(self, count: int) -> tuple[list[float], tuple[float, float], float]:
        """Return what the next steps are made with: the rates, without the bias of the first moment, (β1, β2), ε."""
        if not self._bound:
            self._bind()
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        rates = [group["lr"] / (1 - beta1 ** (self._steps + number)) for number in range(1, count + 1)]
        return rates, (beta1, beta2), group["eps"]

    def count_steps(self, rates: Sequence[float]) -> None:
        """Count steps that were made, with these of the rates that :meth:`next_steps` told."""
        if rates:
            self._steps += len(rates)
            self._rate = rates[-1]
            self._made = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients of the last :meth:`FusedNetwork.backward`."""
        (rate,), betas, eps = self.next_steps(1)
        self._fused.step(rate, betas, eps)
        self.count_steps([rate])

    def write_gradients(self) -> None:
        """Write the gradients of the last step to ``.grad``; none are there before the first."""
        if self._made:
            self._fused.write_gradients(self._moments, self._rate)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's state dict."""
        super().load_state_dict(state_dict)
        self._bound = False
