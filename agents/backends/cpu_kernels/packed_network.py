"""One update on a CPU with as few passes over memory as it takes: the same arithmetic as autograd's, written out.

What is trained stays in float32 where the network has it. Beside it lies a *packed* copy of each weight w, in the
precision and in the order in which the CPU computes fastest: convolutions channels last, the first one on blocks of
pixels (:class:`wn_rl.networks.FirstConvolution`) with the division by 255 in its weights. One C function per update
takes the packed weights' gradients, turns them into those of what is trained (v and g of weight normalization), makes
the optimizer's step and writes the next packed weights. A weight whose parameterization the C function does not know is
computed, and its gradient taken further, by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wn_rl.networks import FirstConvolution, QNetwork
from wn_rl.parameterizations.base import Normalization, bias_of, normalize_output
from wn_rl.parameterizations.spectral_norm import SpectralNormalized
from wn_rl.replay import Minibatch

from .output_normalization import SavedPass, normalization_backward, normalization_of, normalized
from .structs import OptimizerStep, TrainedLayerStruct, WeightKind
from .trained_layers import TrainedLayer, trained_weight, weight_kind

aten = torch.ops.aten


@dataclass(eq=False)
class PackedWeights:
    """The weights that the forward and backward pass read.

    Attributes:
        weights: from input to output; convolutions (units, channels, k, k) channels last, dense ones (units, inputs).
        biases: (units,), of the weight's dtype. The output layer's are float32, the others in the passes' precision.
        normalizations: what normalizes each layer's output and adds its bias in place of ``biases``, or None.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    normalizations: list[Normalization | None]


def unsupported(network: QNetwork) -> str:
    """Return why ``network`` cannot be trained on packed weights, an empty text if it can."""
    layers = [*network.convolutions, network.hidden, network.output]
    for layer in layers:
        if isinstance(problem := weight_kind(layer), str):
            return problem
        own_hooks = [hook for hook in layer._forward_hooks.values() if hook is not normalize_output]
        if own_hooks or layer._forward_pre_hooks:
            return "a layer has hooks"
    if any(p.device.type != "cpu" or p.dtype != torch.float32 or not p.is_contiguous() for p in network.parameters()):
        return "its parameters are not contiguous float32 on the CPU"
    first = next(iter(network.convolutions), None)
    observation = torch.zeros(1, *network.spec.observation_shape, dtype=torch.uint8)
    if not isinstance(first, FirstConvolution) or not first.packs(observation):
        return "its first convolution does not fit blocks of pixels"
    return ""


def channels_last(module: nn.Conv2d, weight: Tensor) -> Tensor:
    """Return a convolution's weight as (units, k, k, channels) of its packed one."""
    if not isinstance(module, FirstConvolution):
        return weight.permute(0, 2, 3, 1)
    return module.blocks(weight)


class PackedNetwork:
    """A Q-network's forward and backward pass by torch's operations on packed weights, and its step in C.

    A change of the network's parameters by somebody else is noticed by their version, so :meth:`q_values` is always
    that of the network.
    """

    def __init__(self, network: QNetwork, library: ctypes.CDLL, *, precision: torch.dtype) -> None:
        """Pack the weights.

        Args:
            network: one that :func:`unsupported` has nothing against.
            library: what :func:`.loader.load` returned.
            precision: of the hidden layers, float32 or bfloat16.
        """
        self.network = network
        self.library = library
        self.precision = precision
        # The first convolution's input is blocks of stride × stride pixels, and it visits each.
        self.block, *others = (stride for _, _, stride in network.spec.convolutions)
        self.strides = [1, *others]
        self.layers = [self._layer(module) for module in (*network.convolutions, network.hidden, network.output)]
        self.structs = (TrainedLayerStruct * len(self.layers))()
        self.g_gradients = [torch.zeros(len(layer.v)) for layer in self.layers]
        self.gain_gradients = [torch.zeros(len(layer.v)) for layer in self.layers]
        self._allocate()
        self._per_unit = [torch.zeros(3, len(layer.v)) for layer in self.layers]  # norm, row_factor, v_factor
        self._trained = list(network.parameters())
        self._versions: list[int] = []
        self._computed = {layer.module: layer for layer in self.layers if layer.kind is WeightKind.GIVEN}
        self._graphs: dict[nn.Module, Tensor] = {}
        self._spectral = any(layer.kind is WeightKind.SPECTRAL for layer in self.layers)
        self._spectral_memory: list[Tensor | None] = []  # the structures hold its addresses only
        self._packed_for_training = False
        self.computed_from = [
            parameter
            for module in self._computed
            for parameter in module.parametrizations["weight"].parameters()  # type: ignore[index,union-attr]
        ]
        for index, layer in enumerate(self.layers):
            self._fill_struct(self.structs[index], index, layer)

    def _allocate(self) -> None:
        """Allocate packed weights and gradients."""
        self._rows = torch.empty(0)
        self._new_statistics: list[tuple[Tensor, Tensor]] = []
        normalizations = [layer.normalization for layer in self.layers]
        self.packed = PackedWeights([self._empty_weight(layer) for layer in self.layers], [], normalizations)
        self.packed.biases = [torch.empty(len(weight), dtype=weight.dtype) for weight in self.packed.weights]
        # A gradient in another order than v needs memory of its own.
        self.v_gradients = [
            None if layer.offsets is None and layer.kind is not WeightKind.GIVEN else torch.zeros_like(layer.v)
            for layer in self.layers
        ]

    def _layer(self, module: nn.Module) -> TrainedLayer:
        kind = weight_kind(module)
        assert isinstance(kind, WeightKind)
        v, g = trained_weight(module, kind)
        b = bias_of(module)
        assert isinstance(b, nn.Parameter)
        offsets = None
        if isinstance(module, nn.Conv2d):
            inputs = torch.arange(v[0].numel()).view(1, *v.shape[1:])
            order = channels_last(module, inputs).flatten()
            offsets = torch.empty(len(order), dtype=torch.int32)
            offsets[order] = torch.arange(len(order), dtype=torch.int32)
        scale = 1 / 255 if isinstance(module, FirstConvolution) else 1.0
        bfloat16 = module is not self.network.output and self.precision is torch.bfloat16
        return TrainedLayer(module, kind, v, g, b, normalization_of(module), offsets, scale, bfloat16)

    def _empty_weight(self, layer: TrainedLayer) -> Tensor:
        """Return memory for a packed weight."""
        dtype = torch.bfloat16 if layer.bfloat16 else torch.float32
        if isinstance(layer.module, nn.Conv2d):
            return torch.empty(channels_last(layer.module, layer.v).shape, dtype=dtype).permute(0, 3, 1, 2)
        return torch.empty(layer.v.shape, dtype=dtype)

    def _fill_struct(self, struct: Any, index: int, layer: TrainedLayer) -> None:  # noqa: ANN401 - ctypes sets its fields
        struct.units, struct.inputs = len(layer.v), layer.v[0].numel()
        struct.weight_kind, struct.packed_bfloat16 = layer.kind, layer.bfloat16
        struct.input_scale = layer.input_scale
        addresses = {
            "v": layer.v,
            "g": layer.g,
            "b": layer.b,
            "gain": layer.gain,
            "gain_gradient": self.gain_gradients[index],
            "g_gradient": self.g_gradients[index],
            "v_gradient": self.v_gradients[index],
        }
        addresses |= zip(("norm", "row_factor", "v_factor"), self._per_unit[index], strict=True)
        if layer.kind is WeightKind.SPECTRAL:
            computes = layer.module.parametrizations["weight"][0]  # type: ignore[index]
            assert isinstance(computes, SpectralNormalized)
            struct.iterations, struct.normalize_eps = computes.iterations, computes.eps
            addresses |= {"left": computes.running_u, "right": computes.running_v, "c": computes.running_scale}
            addresses |= {"product": torch.zeros(struct.units + struct.inputs), "sigma": torch.zeros(1)}
            addresses["alignment"] = torch.zeros(struct.units)
            self._spectral_memory += addresses.values()
        for name, tensor in (addresses | self._set_layout(struct, index, layer)).items():
            setattr(struct, name, None if tensor is None else tensor.data_ptr())

    def _set_layout(self, struct: Any, index: int, layer: TrainedLayer) -> dict[str, Tensor | None]:  # noqa: ANN401 - see above
        """Set the layouts of packed weights and gradients; returns the tensors to point at, by field."""
        struct.packed_unit_stride = struct.gradient_unit_stride = struct.inputs
        struct.gradient_bfloat16 = layer.bfloat16
        struct.bias_gradient_bfloat16 = layer.bfloat16 and layer.normalization is None
        struct.v_gradient_bfloat16 = layer.bfloat16 and self.v_gradients[index] is None
        return {
            "packed_offset": layer.offsets,
            "gradient_offset": layer.offsets,
            "packed": self.packed.weights[index],
            "packed_bias": self.packed.biases[index],
        }

    def refresh(self) -> None:
        """Pack the weights as acting takes them, if they were packed for training or somebody has changed them."""
        versions = [parameter._version for parameter in self._trained]
        if versions != self._versions or self._packed_for_training:
            self._compute_weights()
            self._packed_for_training = False
            self._pack(versions)

    def refresh_for_training(self) -> None:
        """Pack the weights as a training pass takes them, where torch computes them with the graph of their gradient.

        Spectral normalization is left to whoever makes the pass: :meth:`update` in C, :meth:`forward_both` here.
        """
        if not self._computed:
            versions = [parameter._version for parameter in self._trained]
            if versions != self._versions:
                self.refresh()
            self._packed_for_training = self._spectral
            return
        with torch.enable_grad():
            self._compute_weights()
        self._packed_for_training = True
        self._pack([parameter._version for parameter in self._trained])

    def prepare_training_pass(self) -> None:
        """Make the steps of power iteration of spectral normalization, and pack the weights that depend on them."""
        if self._spectral:
            self.library.prepare_training_pass(self.structs, len(self.layers), torch.get_num_threads())

    def _compute_weights(self) -> None:
        for module, layer in self._computed.items():
            w = module.weight
            assert isinstance(w, Tensor)
            self._graphs[module] = w
            layer.v.copy_(w.detach())

    def _pack(self, versions: list[int]) -> None:
        self.library.pack_layers(self.structs, len(self.layers), torch.get_num_threads())
        self._versions = versions

    def backward_computed(self) -> None:
        """Take the gradients of the weights that torch computes further, to the ``.grad`` of what they are made of."""
        for layer, v_gradient in zip(self.layers, self.v_gradients, strict=True):
            if (w := self._graphs.pop(layer.module, None)) is None:
                continue
            assert v_gradient is not None
            made_of = list(layer.module.parametrizations["weight"].parameters())  # type: ignore[index,union-attr]
            gradients = torch.autograd.grad(w, made_of, v_gradient, allow_unused=True)
            for parameter, gradient in zip(made_of, gradients, strict=True):
                parameter.grad = gradient

    @torch.no_grad()
    def pack_network(self, plain: QNetwork) -> PackedWeights:
        """Return packed weights of a network of the same shape with plain weights, which is not trained.

        Outputs may be normalized; its normalizations are kept as they are, in evaluation mode.
        """
        copied = PackedWeights([], [], [])
        layers = (*plain.convolutions, plain.hidden, plain.output)
        for module, layer, weight in zip(layers, self.layers, self.packed.weights, strict=True):
            w, b = module.weight, bias_of(module)
            assert isinstance(w, Tensor)
            assert b is not None
            copied.normalizations.append(normalization_of(module))
            ordered = channels_last(module, w).permute(0, 3, 1, 2) if isinstance(module, nn.Conv2d) else w
            copied.weights.append(torch.empty_like(weight).copy_(ordered * layer.input_scale))
            copied.biases.append(b.to(weight.dtype, copy=True))
        return copied

    def pack_observations(self, observations: Tensor) -> Tensor:
        """Return uint8 observations, (B, C, H, W), as blocks for the first layer: (B, C·s², H/s, W/s)."""
        if observations.stride()[-2:] != (observations.shape[-1], 1):
            observations = observations.contiguous()
        batch, channels, height, width = observations.shape
        size = self.block
        shape = (batch, height // size, width // size, channels * size * size)
        blocks = torch.empty(shape, dtype=self.precision)
        self.library.pack_frames(
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
    def forward(self, weights: PackedWeights, observations: Tensor) -> tuple[Tensor, Any]:
        """Return Q-values, float32 (B, actions), and what was saved; normalizations have running statistics."""
        return self._forward_pass(weights, observations, training=False)

    def _forward_pass(
        self, weights: PackedWeights, observations: Tensor, *, training: bool
    ) -> tuple[Tensor, SavedPass]:
        """Return Q-values and what :meth:`backward` needs.

        With ``training`` batch statistics are those of the observations; the running ones take them in at :meth:`step`.
        """
        x, saved = self.pack_observations(observations), SavedPass([], [], [])
        normalizations = weights.normalizations

        def normalize(index: int, t: Tensor) -> Tensor:
            normalization = normalizations[index]
            return t if normalization is None else normalized(normalization, t, saved if training else None)

        def dense(index: int) -> Tensor:
            weight, x = weights.weights[index].t(), saved.inputs[-1]
            return x @ weight if normalizations[index] else torch.addmm(weights.biases[index], x, weight)

        for index, stride in enumerate(self.strides):
            saved.inputs.append(x)
            bias = None if normalizations[index] else weights.biases[index]
            x = normalize(index, torch.conv2d(x, weights.weights[index], bias, stride)).relu_()
        saved.inputs.append(x.flatten(1))
        saved.inputs.append(normalize(-2, dense(-2)).relu_().float())
        return normalize(-1, dense(-1)), saved

    @torch.no_grad()
    def forward_both(self, target: PackedWeights, batch: Minibatch) -> tuple[Tensor, Tensor, Any]:
        """Return the Q-values of the target network on the next observations, those of this one, and its saved pass."""
        next_q_values, _ = self.forward(target, batch.next_observations)
        return (next_q_values, *self._forward_pass(self.packed, batch.observations, training=True))

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations."""
        self.refresh()
        return self.forward(self.packed, observations)[0]

    @torch.no_grad()
    def backward(self, saved: Any, q_gradient: Tensor) -> None:  # noqa: ANN401 - what forward returned
        """Leave the packed weights' gradients for :meth:`step`.

        Args:
            saved: what :meth:`forward_both` returned beside the Q-values.
            q_gradient: dL/dQ, float32 (B, actions).
        """
        *inputs, flat, hidden = saved.inputs
        weights, layers = self.packed.weights, self.layers
        sums = list(saved.normalized)
        self._new_statistics = saved.statistics
        dy = self._normalization_backward(-1, q_gradient, sums)
        layers[-1].weight_gradient = dy.t() @ hidden
        dy = aten.threshold_backward(dy @ weights[-1], hidden, 0)
        dy = self._normalization_backward(-2, dy, sums).to(self.precision)
        layers[-2].weight_gradient = dy.t() @ flat
        dy = aten.threshold_backward(dy @ weights[-2], flat, 0)
        dy = dy.view(len(dy), *self._last_output_shape(inputs[-1]))
        for index in reversed(range(len(inputs))):
            x, weight, stride = inputs[index], weights[index], self.strides[index]
            dy = self._normalization_backward(index, dy, sums).to(self.precision)
            wanted = [index > 0, True, layers[index].normalization is None]
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
            if db is not None:
                layers[index].bias_gradient = db
            if index > 0:
                dy = aten.threshold_backward(dx, x, 0)

    def _normalization_backward(self, index: int, dy: Tensor, saved: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the gradient by a layer's sums from that by its normalized output; leaves those of bias and γ.

        Without normalization that is ``dy``, and the bias's gradient is left for a dense layer only.
        """
        layer = self.layers[index]
        if layer.normalization is None:
            if dy.dim() == 2:
                layer.bias_gradient = dy.to(self.packed.weights[index].dtype).sum(0)
            return dy
        dt, layer.bias_gradient, gain_gradient = normalization_backward(layer.normalization, *saved.pop(), dy)
        if gain_gradient is not None:
            self.gain_gradients[index].copy_(gain_gradient)
        return dt

    def _last_output_shape(self, x: Tensor) -> tuple[int, int, int]:
        """Return (channels, height, width) of the last convolution's output, given its input."""
        channels, _, *kernel = self.packed.weights[-3].shape
        height, width = ((x.shape[2 + i] - kernel[i]) // self.strides[-1] + 1 for i in range(2))
        return channels, height, width

    def step(self, step: OptimizerStep) -> None:
        """Make an optimizer step of everything that torch does not compute."""
        threads = torch.get_num_threads()
        max_inputs = max(layer.v[0].numel() for layer in self.layers)
        if self._rows.numel() < threads * max_inputs:
            self._rows = torch.empty(threads * max_inputs)
        for struct, layer in zip(self.structs, self.layers, strict=True):
            assert layer.weight_gradient is not None
            assert layer.bias_gradient is not None
            struct.packed_gradient = layer.weight_gradient.data_ptr()
            struct.bias_gradient = layer.bias_gradient.data_ptr()
        rows = self._rows.data_ptr()
        self.library.step_layers(self.structs, len(self.layers), threads, rows, max_inputs, ctypes.byref(step))
        for running, new in self._new_statistics:
            running.copy_(new)

    def write_gradients(self, value_before: Callable[[nn.Parameter, Tensor, Tensor, Tensor], Tensor]) -> None:
        """Write the gradients of the last step to ``.grad``.

        Args:
            value_before: returns what a parameter was before that step, given its gradient as a function of itself:
                row_factor · row + v_factor · value, in the order (parameter, row_factor, row, v_factor).
        """
        del value_before
        self._write_gain_gradients()
        for layer, v_gradient, g_gradient in zip(self.layers, self.v_gradients, self.g_gradients, strict=True):
            assert layer.weight_gradient is not None
            assert layer.bias_gradient is not None
            if layer.kind is not WeightKind.GIVEN:
                # Without memory of its own it was written over the packed weight's.
                layer.v.grad = (layer.weight_gradient if v_gradient is None else v_gradient).float()
            layer.b.grad = layer.bias_gradient.float()
            if layer.g is not None:
                layer.g.grad = g_gradient.view_as(layer.g).clone()

    def _write_gain_gradients(self) -> None:
        for layer, gain_gradient in zip(self.layers, self.gain_gradients, strict=True):
            if layer.gain is not None:
                layer.gain.grad = gain_gradient.clone()
