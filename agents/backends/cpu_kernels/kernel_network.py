"""The whole update in one call of C: float32 on processors with AVX-512, AVX2, SSE2 or NEON, bfloat16 with AVX512-BF16.

The same arithmetic as :class:`.packed_network.PackedNetwork`'s with float32 where that rounds to bfloat16 between two
operations: sums, biases, the hidden layer and all gradients of weights. ``csrc/structs.h`` defines the layouts.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wn_rl.networks import QNetwork
from wn_rl.parameterizations.base import bias_of
from wn_rl.parameterizations.spectral_norm import SpectralNormalized
from wn_rl.replay import LazyMinibatch, Minibatch

from .layouts import (
    conv_offsets,
    conv_shapes,
    network_shape,
    pack_conv_weight,
    pair_size,
    tile_stages,
)
from .output_normalization import PassNormalizations, normalization_of, pass_normalizations
from .packed_network import PackedNetwork, PackedWeights
from .structs import BackwardArgs, ForwardArgs, OptimizerStep, ReplayStorage, TDLossArgs, WeightKind
from .trained_layers import TrainedLayer
from .workspace import Activations, ObservationFrames, PreparedUpdate, TDLoss, Workspace, as_frames


class KernelNetwork(PackedNetwork):
    """A Q-network's forward pass, backward pass and step in C; an update is one call.

    Attributes:
        stage_seconds: float64, shape (3,): what :meth:`update` has taken so far for gathering transitions, for the
            forward pass with the loss, and for the backward pass with the step.
    """

    def _allocate(self) -> None:
        self.pair = pair_size(self.precision)
        self.convolutions = conv_shapes(self.network)
        normalizations = [layer.normalization for layer in self.layers]
        tiles = tile_stages(self.network, self.library, self.precision)
        self.shape = network_shape(self.network, self.precision, self.block, tiles)
        self.workspace = Workspace(self.shape, self.precision, normalizations)
        self.packed = PackedWeights(
            [self._empty_weight(layer) for layer in self.layers], [layer.b for layer in self.layers], normalizations
        )
        self._with_running_statistics: weakref.WeakKeyDictionary[PackedWeights, PassNormalizations] = (
            weakref.WeakKeyDictionary()
        )
        self._bias_gradients = [torch.zeros(len(layer.v)) for layer in self.layers]
        # The hidden layer's gradient becomes its step row by row and is never whole, unless torch takes it further.
        hidden = len(self.convolutions)
        self.v_gradients = [
            None if index == hidden and layer.kind is not WeightKind.GIVEN else torch.zeros_like(layer.v)
            for index, layer in enumerate(self.layers)
        ]
        self._weight_gradients = [
            None if index == hidden else torch.zeros(layer.v.numel()) for index, layer in enumerate(self.layers)
        ]
        self.transposed_weights: list[Tensor | None] = [
            None if index == 0 or index >= hidden else torch.zeros(layer.v.numel(), dtype=self.precision)
            for index, layer in enumerate(self.layers)
        ]
        self._offsets: list[Tensor] = []
        self._last_pass = ForwardArgs()
        self._q_gradient = torch.empty(0)
        self._prepared: PreparedUpdate | None = None
        self.stage_seconds = torch.zeros(3, dtype=torch.float64)

    def _empty_weight(self, layer: TrainedLayer) -> Tensor:
        dtype = torch.bfloat16 if layer.bfloat16 else torch.float32
        return torch.zeros(layer.v.shape if isinstance(layer.module, nn.Linear) else layer.v.numel(), dtype=dtype)

    def _set_layout(self, struct: Any, index: int, layer: TrainedLayer) -> dict[str, Tensor | None]:  # noqa: ANN401
        tensors: dict[str, Tensor | None] = {
            "packed": self.packed.weights[index],
            "packed_gradient": self._weight_gradients[index],
            "bias_gradient": self._bias_gradients[index],
        }
        struct.packed_unit_stride = struct.gradient_unit_stride = struct.inputs
        if isinstance(layer.module, nn.Conv2d):
            conv = self.convolutions[index]
            offsets = conv_offsets(layer.module, layer.v, conv, self.pair)
            self._offsets += offsets  # the structures hold their addresses only
            tensors |= {"packed_offset": offsets.packed, "gradient_offset": offsets.gradient}
            struct.packed_unit_stride, struct.gradient_unit_stride = self.pair, 1
            if (transposed := self.transposed_weights[index]) is not None:
                tensors |= {"transposed_offset": offsets.transposed, "transposed": transposed}
                struct.transposed_unit_stride = conv.in_channels * self.pair
                struct.transposed_pair = self.pair  # its words pair units
        return tensors

    @torch.no_grad()
    def pack_network(self, plain: QNetwork) -> PackedWeights:
        """Return packed weights of a network of the same shape with plain weights, as :class:`.PackedNetwork`."""
        copied = PackedWeights([], [], [])
        modules = (*plain.convolutions, plain.hidden, plain.output)
        for module, layer, packed in zip(modules, self.layers, self.packed.weights, strict=True):
            w, b = module.weight, bias_of(module)
            assert isinstance(w, Tensor)
            assert b is not None
            copied.normalizations.append(normalization_of(module))
            if isinstance(module, nn.Conv2d):
                copied.weights.append(pack_conv_weight(module, w, self.pair, layer.input_scale).to(packed.dtype))
            else:
                copied.weights.append(w.to(packed.dtype, copy=True))
            copied.biases.append(b.float().clone())
        return copied

    def _fill_forward(
        self,
        args: ForwardArgs,
        weights: PackedWeights,
        observations: ObservationFrames,
        activations: Activations,
        q_values: Tensor,
    ) -> None:
        hidden = len(self.convolutions)
        for index, address in enumerate(self._normalizations(weights, activations).addresses()):
            args.normalization[index] = address
        for index in range(hidden):
            args.conv_weight[index] = weights.weights[index].data_ptr()
            args.conv_bias[index] = weights.biases[index].data_ptr()
        for index in range(hidden + 1):
            saved = activations.saved_inputs
            args.saved_input[index] = saved[index].data_ptr() if saved else None
        args.hidden_weight, args.hidden_bias = weights.weights[hidden].data_ptr(), weights.biases[hidden].data_ptr()
        args.output_weight, args.output_bias = weights.weights[-1].data_ptr(), weights.biases[-1].data_ptr()
        args.frames, args.frame_indices = observations.frames.data_ptr(), observations.indices.data_ptr()
        args.batch, args.frame_index_stride = len(observations.indices), observations.indices.stride(0)
        args.nonzero_blocks = activations.nonzero_blocks.data_ptr()
        args.flat, args.hidden = activations.flat.data_ptr(), activations.hidden.data_ptr()
        args.flat_columns = activations.flat_columns.data_ptr()
        args.q_values = q_values.data_ptr()

    def _normalizations(self, weights: PackedWeights, activations: Activations) -> PassNormalizations:
        """Return the normalizations of a pass; for one that is saved, the trained network's on a minibatch."""
        if activations.normalizations is not None:
            for index, struct in enumerate(activations.normalizations.structs):
                if struct is not None:
                    struct.bias_gradient = self._bias_gradients[index].data_ptr()
                    struct.gain_gradient = self.gain_gradients[index].data_ptr()
            return activations.normalizations
        if weights not in self._with_running_statistics:
            self._with_running_statistics[weights] = pass_normalizations(self.shape, weights.normalizations)
        return self._with_running_statistics[weights]

    def _forward(
        self, passes: list[tuple[PackedWeights, ObservationFrames, bool]]
    ) -> tuple[list[Tensor], ctypes.Array[ForwardArgs]]:
        """Make forward passes: weights, observations, and whether they are saved for a backward pass."""
        scratch, threads = self.workspace.scratch()
        structs = (ForwardArgs * len(passes))()
        made = []
        for struct, (weights, observations, save) in zip(structs, passes, strict=True):
            batch = len(observations.indices)
            made.append(torch.empty(batch, self.shape.actions))
            self._fill_forward(struct, weights, observations, self.workspace.activations_for(batch, save), made[-1])
        self.library.network_forward(ctypes.byref(self.shape), structs, len(passes), scratch, threads)
        return made, structs

    @torch.no_grad()
    def forward(self, weights: PackedWeights, observations: Tensor) -> tuple[Tensor, Any]:
        """Return Q-values, float32 (B, actions); nothing is saved for :meth:`backward`."""
        (q_values,), _ = self._forward([(weights, as_frames(observations), False)])
        return q_values, None

    @torch.no_grad()
    def forward_both(self, target: PackedWeights, batch: Minibatch) -> tuple[Tensor, Tensor, Any]:
        """Return the Q-values of the target network on the next observations, those of this one, and its saved pass.

        What is saved is valid until the next call. Frames that are still in replay are read there.
        """
        if isinstance(batch, LazyMinibatch):
            frames, indices = batch.storage.frames, batch.frame_indices
            now, then = ObservationFrames(frames, indices[:, :-1]), ObservationFrames(frames, indices[:, 1:])
        else:
            now, then = as_frames(batch.observations), as_frames(batch.next_observations)
        (next_q_values, q_values), structs = self._forward([(target, then, False), (self.packed, now, True)])
        return next_q_values, q_values, structs[1]

    @torch.no_grad()
    def backward(self, saved: Any, q_gradient: Tensor) -> None:  # noqa: ANN401 - what forward_both returned
        """Keep dL/dQ, float32 (B, actions), for :meth:`step`, which makes the whole backward pass."""
        self._last_pass, self._q_gradient = saved, q_gradient.contiguous()

    @torch.no_grad()
    def update(
        self,
        target: PackedWeights,
        batch: Minibatch,
        loss: TDLoss,
        steps: ctypes.Array[OptimizerStep],
    ) -> tuple[int, float]:
        """Make whole updates in one call: :meth:`forward_both`, the loss, :meth:`backward` and :meth:`step`.

        Args:
            target: the target network's packed weights.
            batch: transitions, of all updates one after the other; drawn ones at which nobody has looked are gathered
                from replay, others must be those of one update.
            loss: what is minimized.
            steps: the optimizer's step of each update.

        Returns:
            How many updates were made, and the last loss. The first whose loss is not finite is not made, nor are
            those after it, unless the transitions have no indices.

        Raises:
            IndexError: a transition has an index or an action that does not exist; no update was made.
            ValueError: the observations are not what the network takes, or fields differ in length.
        """
        drawn = batch if isinstance(batch, LazyMinibatch) and batch.is_lazy else None
        indices = None if drawn is None else drawn.indices.long().contiguous()
        count, transitions = len(steps), len(batch.actions if indices is None else indices)
        size = transitions // count
        if size * count != transitions or (count > 1 and indices is None):
            raise ValueError(f"the transitions cannot be divided among {count} updates")
        prepared = self._prepared
        if prepared is None or drawn is None or not prepared.serves(target, drawn.storage, size, loss):
            prepared = self._prepared = self._prepare(target, batch, drawn, size, loss)
        scratch, threads = self.workspace.scratch()
        prepared.alternate_flat()
        last = ctypes.c_float()
        made: int = self.library.network_updates(
            ctypes.byref(self.shape),
            prepared.passes,
            None if prepared.replay is None else ctypes.byref(prepared.replay),
            None if indices is None else indices.data_ptr(),
            count,
            ctypes.byref(prepared.loss_args),
            ctypes.byref(prepared.backward),
            self.structs,
            scratch,
            threads,
            steps,
            prepared.spare_flat.data_ptr(),
            ctypes.byref(last),
        )
        if made % 2 == 0 or made < 0:
            prepared.alternate_flat()  # the last one left it in the other buffer; without one the step before did
        if made < 0:
            raise IndexError("a transition has an index or an action that does not exist")
        if made:
            self._last_pass, self._q_gradient = prepared.passes[1], prepared.q_gradient
        return made, last.value

    def _prepare(
        self, target: PackedWeights, batch: Minibatch, drawn: LazyMinibatch | None, size: int, loss: TDLoss
    ) -> PreparedUpdate:
        replay = None
        if drawn is not None:
            kept, frames = drawn.storage, len(drawn.storage.offsets) - 1
            indices = torch.empty(size, frames + 1, dtype=torch.int64)
            then = ObservationFrames(kept.frames, indices[:, 1:])
            now = ObservationFrames(kept.frames, indices[:, :-1])
            actions, rewards = torch.empty(size, dtype=torch.int64), torch.empty(size)
            terminals = torch.empty(size, dtype=torch.bool)
            tensors = (kept.entry_of, kept.age, kept.actions, kept.terminals, kept.rewards)
            replay = ReplayStorage(*(tensor.data_ptr() for tensor in tensors), len(kept.age), kept.num_envs, frames)
            shape, sizes = (frames, *kept.frames.shape[1:]), {size}
        else:
            then, now = as_frames(batch.next_observations), as_frames(batch.observations)
            indices = now.indices
            actions, rewards = batch.actions.long().contiguous(), batch.rewards.float().contiguous()
            terminals = batch.terminals.bool().contiguous()
            shape = tuple(batch.observations.shape[1:])
            sizes = {size, len(rewards), len(terminals), len(then.indices), len(now.indices)}
        if shape != tuple(self.network.spec.observation_shape) or len(sizes) > 1:
            raise ValueError(f"a minibatch of {size} transitions with observations of {shape} does not fit the network")
        q_gradient = torch.empty(size, self.shape.actions)
        passes = (ForwardArgs * 2)()
        activations = [self.workspace.activations_for(size, save) for save in (False, True)]
        q_values = torch.empty(2, size, self.shape.actions)
        for args in zip(passes, (target, self.packed), (then, now), activations, q_values, strict=True):
            self._fill_forward(*args)
        arrays = (indices, actions, rewards, terminals, q_gradient, loss.sums, self.stage_seconds)
        settings = (loss.gamma, loss.reward_clip, loss.mean, batch.indices is None)
        loss_args = TDLossArgs(*(tensor.data_ptr() for tensor in arrays), *settings)
        backward = self._backward_args(q_gradient)
        return PreparedUpdate(
            target=target,
            storage=None if drawn is None else weakref.ref(drawn.storage),
            size=size,
            loss=loss,
            passes=passes,
            replay=replay,
            loss_args=loss_args,
            backward=backward,
            q_gradient=q_gradient,
            activations=activations[1],
            spare_flat=torch.empty_like(activations[1].flat),
            alive=[q_values, *activations, *arrays, *((then, now) if drawn is None else ())],
        )

    def _backward_args(self, q_gradient: Tensor) -> BackwardArgs:
        """Return the arguments of a backward pass, with memory for as many observations as ``q_gradient`` has."""
        gradients, replaced = self.workspace.gradients_for(len(q_gradient))
        if replaced:
            self._prepared = None  # it refers to the memory that was replaced
        args = BackwardArgs()
        args.q_gradient, args.flat_gradient = q_gradient.data_ptr(), gradients.flat.data_ptr()
        args.hidden_gradient = gradients.hidden.data_ptr()
        args.hidden_gradient_pairs = gradients.hidden_pairs.data_ptr()
        for index, conv_gradient in enumerate(gradients.convolutions):
            transposed, weight_gradient = self.transposed_weights[index], self._weight_gradients[index]
            assert weight_gradient is not None
            args.transposed_weight[index] = None if transposed is None else transposed.data_ptr()
            args.conv_gradient[index] = conv_gradient.data_ptr()
            args.transposed_gradient[index] = gradients.transposed[index].data_ptr() if gradients.transposed else None
            args.weight_gradient[index] = weight_gradient.data_ptr()
            args.bias_gradient[index] = self._bias_gradients[index].data_ptr()
        return args

    def step(self, step: OptimizerStep) -> None:
        """Make the backward pass and an optimizer step of everything that torch does not compute."""
        args, (scratch, threads) = self._backward_args(self._q_gradient), self.workspace.scratch()
        self.library.network_backward_and_step(
            ctypes.byref(self.shape),
            ctypes.byref(self._last_pass),
            ctypes.byref(args),
            self.structs,
            scratch,
            threads,
            ctypes.byref(step),
        )

    @torch.no_grad()
    def write_gradients(self, value_before: Callable[[nn.Parameter, Tensor, Tensor, Tensor], Tensor]) -> None:
        """Write the gradients of the last step to ``.grad``, as :meth:`.PackedNetwork.write_gradients`."""
        self._write_gain_gradients()
        for layer, v_gradient, g_gradient, b_gradient in zip(
            self.layers, self.v_gradients, self.g_gradients, self._bias_gradients, strict=True
        ):
            if v_gradient is None:
                layer.v.grad = self._hidden_gradient(value_before)
            elif layer.kind is not WeightKind.GIVEN:
                layer.v.grad = v_gradient.clone()
            layer.b.grad = b_gradient.clone()
            if layer.g is not None:
                layer.g.grad = g_gradient.view_as(layer.g).clone()

    def _hidden_gradient(self, value_before: Callable[[nn.Parameter, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return the gradient of the hidden layer's v in the last step, worked out again from what the step left."""
        layer = self.layers[-2]
        _, row_factor, v_factor = self._per_unit[-2][:, :, None]
        gradients = self.workspace.gradients
        assert gradients is not None
        flat = self.workspace.activations_for(len(self._q_gradient), True).flat
        rows = gradients.hidden.float().t() @ flat.float()
        gradient: Tensor = row_factor * rows
        if layer.kind is WeightKind.SPECTRAL:
            spectral = layer.module.parametrizations["weight"][0]  # type: ignore[index]
            assert isinstance(spectral, SpectralNormalized)
            gradient += v_factor * spectral.running_v
        if layer.kind in (WeightKind.NORM, WeightKind.NORM_EXP):
            assert isinstance(layer.v, nn.Parameter)
            gradient += v_factor * value_before(layer.v, row_factor, rows, v_factor)
        return gradient
