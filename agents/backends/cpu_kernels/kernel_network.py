"""The whole update in one compiled call, for processors with vectors of 512 bits; others take torch's operations.

The same arithmetic as :class:`agents.backends.cpu_kernels.packed_network.FusedNetwork`'s with float32 where that rounds to bfloat16 between two
operations: sums, biases, the hidden layer and all gradients of weights. Layouts are said in ``passes.c``.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wn_rl.networks import QNetwork
from wn_rl.replay import DrawnMinibatch, Entries, Minibatch

from .packed_network import FusedNetwork, Working, _arranged, _Layer

MOST_CONVOLUTIONS, MOST_FRAMES, MOST_LINES = 8, 64, 64
"""As in ``passes.c``."""
LARGEST_TILE = 12
"""Places, likewise."""
MOST_ROOMS = 8
"""Numbers of observations for which memory is kept where nothing is left for a way back; a run has three or four."""
Integer, Pointer = ctypes.c_int64, ctypes.c_void_p


class _Convolution(ctypes.Structure):
    _fields_ = tuple(
        (name, Integer) for name in ("height", "width", "channels", "kernel", "stride", "down", "across", "units")
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        ("convolutions", Integer),
        ("convolution", _Convolution * MOST_CONVOLUTIONS),
        *((name, Integer) for name in ("stack", "block", "flat", "hidden", "actions")),
        *((name, Integer) for name in ("largest", "most_places", "scratch")),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer * MOST_CONVOLUTIONS),
        ("bias", Pointer * MOST_CONVOLUTIONS),
        *((name, Pointer) for name in ("dense", "dense_bias", "output", "output_bias", "frames", "places")),
        *((name, Integer) for name in ("place_step", "batch")),
        ("seen", Pointer * (MOST_CONVOLUTIONS + 1)),
        *((name, Pointer) for name in ("lit", "flat", "hidden", "q_values")),
    )


class _Back(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer * MOST_CONVOLUTIONS),
        *((name, Pointer) for name in ("q_gradient", "hidden", "hidden_words", "flat")),
        ("words", Pointer * MOST_CONVOLUTIONS),
        ("gradient", Pointer * MOST_CONVOLUTIONS),
        ("bias_gradient", Pointer * MOST_CONVOLUTIONS),
    )


class _Store(ctypes.Structure):
    _fields_ = (
        *((name, Pointer) for name in ("entry_of", "age", "actions", "terminals", "rewards")),
        *((name, Integer) for name in ("entries", "num_envs", "stack")),
    )


class _Objective(ctypes.Structure):
    _fields_ = (
        *((name, Pointer) for name in ("places", "actions", "rewards", "terminals", "q_gradient", "sums", "seconds")),
        *((name, ctypes.c_float) for name in ("gamma", "clip")),
        *((name, Integer) for name in ("mean", "unchecked")),
    )


def _convolutions(network: QNetwork) -> list[_Convolution]:
    """Return the shapes of the convolutions, the first on blocks of pixels."""
    channels, height, width = network.spec.observation_shape
    found = []
    for index, (units, kernel, stride) in enumerate(network.spec.convolutions):
        if index == 0:
            channels, height, width = channels * stride**2, height // stride, width // stride
            kernel, stride = kernel // stride, 1
        down, across = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        found.append(_Convolution(height, width, channels, kernel, stride, down, across, units))
        channels, height, width = units, down, across
    return found


def unsupported(network: QNetwork, library: ctypes.CDLL, precision: torch.dtype) -> str:
    """Return why these passes cannot compute ``network``, an empty text if they can."""
    if not hasattr(library, f"forward_{_name(precision)}"):
        return f"the processor has no vectors of 512 bits for {_name(precision)}"
    shapes = _convolutions(network)
    if not 1 <= len(shapes) <= MOST_CONVOLUTIONS:
        return f"it has {len(shapes)} convolutions"
    if network.spec.observation_shape[0] > MOST_FRAMES:
        return f"an observation has more than {MOST_FRAMES} frames"
    if max(shapes[0].height, shapes[0].width) > MOST_LINES:
        return f"an observation has more than {MOST_LINES} blocks in a line"
    for index, conv in enumerate(shapes):
        if conv.channels % 16 or conv.units % 16:
            return "a convolution's channels are no multiple of 16"
        fits = not (conv.kernel % conv.stride or conv.height % conv.stride or conv.width % conv.stride)
        ends = (conv.height - conv.kernel) % conv.stride == 0 == (conv.width - conv.kernel) % conv.stride
        if index > 0 and not (fits and ends):
            return "a convolution's stride divides neither its kernel nor its input"
    if network.spec.flat_features() % 32 or network.spec.hidden_units % 16:
        return "the hidden layer's inputs or units are no multiple of 32 and 16"
    return ""


def _name(precision: torch.dtype) -> str:
    return "bfloat16" if precision is torch.bfloat16 else "float32"


@dataclass(frozen=True)
class Loss:
    """What an update minimizes: the Huber loss of the TD error.

    Attributes:
        gamma: discount per agent step.
        reward_clip: rewards are clipped to ± this; 0: they are not.
        mean: over the minibatch; False: the sum.
        sums: float64, shape (3,): to these the means of loss, |TD error| and Q-value are added.
    """

    gamma: float
    reward_clip: float
    mean: bool
    sums: Tensor


@dataclass
class _Room:
    """Memory of one pass over ``batch`` observations; what :meth:`CompiledNetwork.forward` leaves for the way back."""

    seen: list[Tensor]
    lit: Tensor
    flat: Tensor
    hidden: Tensor


@dataclass
class _Call:
    """What an update is told, made once for a target network's weights, a replay and a size.

    It keeps everything alive but the replay, which may be as large as the machine, and the memory of the way back,
    whose owner forgets a call that refers to it.
    """

    target: Working
    kept: weakref.ref[Entries] | None
    size: int
    loss: Loss
    passes: ctypes.Array[_Pass]
    store: _Store | None
    objective: _Objective
    back: _Back
    q_gradient: Tensor
    room: _Room
    spare: Tensor
    alive: list[Any]

    def serves(self, target: Working, kept: Entries, size: int, loss: Loss) -> bool:
        """Whether this is the call for such an update."""
        same_replay = self.kept is not None and self.kept() is kept
        return same_replay and self.target is target and self.size == size and self.loss is loss

    def turn(self) -> None:
        """Let what the dense layer sees go to the other of two places.

        After a refused update somebody asks for the gradient of the one before.
        """
        room, own = self.room, self.passes[1]
        room.flat, self.spare = self.spare, room.flat
        own.flat = room.flat.data_ptr()
        if room.seen[-1] is self.spare:  # where a word is one number
            room.seen[-1] = room.flat
            own.seen[len(room.seen) - 1] = own.flat


class Seen(NamedTuple):
    """Observations as places in a store of frames.

    Attributes:
        frames: uint8 (any, height, width), contiguous.
        places: int64 (B, stack), the frames of an observation next to each other.
    """

    frames: Tensor
    places: Tensor


def _of(observations: Tensor) -> Seen:
    """Return uint8 observations, (B, C, H, W), as places in themselves."""
    frames = observations.contiguous()
    batch, stack = frames.shape[:2]
    return Seen(frames.view(-1, *frames.shape[2:]), torch.arange(batch * stack).view(batch, stack))


class CompiledNetwork(FusedNetwork):
    """A Q-network's passes and step in compiled code; an update is one call.

    Attributes:
        seconds: float64, shape (3,): what :meth:`learn` has taken so far for looking up transitions, for the way
            forward with the loss, and for the way back with the step.
    """

    def _prepare(self) -> None:
        self.pair = 2 if self.precision is torch.bfloat16 else 1
        self.convolutions = _convolutions(self.network)
        last = self.convolutions[-1]
        self.flat, self.hidden = last.down * last.across * last.units, self.network.spec.hidden_units
        self.actions = self.network.spec.num_actions
        self.working = Working([self._weight_like(layer) for layer in self.layers], [layer.b for layer in self.layers])
        self._bias_gradients = [torch.zeros(len(layer.v)) for layer in self.layers]
        # The dense layer's gradient becomes its step row by row and is never whole.
        dense = len(self.convolutions)
        self.v_gradients = [
            None if index == dense else torch.zeros_like(layer.v) for index, layer in enumerate(self.layers)
        ]
        self._gradients = [
            None if index == dense else torch.zeros(layer.v.numel()) for index, layer in enumerate(self.layers)
        ]
        self._back_weights: list[Tensor | None] = [
            None if index == 0 or index >= dense else torch.zeros(layer.v.numel(), dtype=self.precision)
            for index, layer in enumerate(self.layers)
        ]
        self._orders: list[Tensor] = []
        self._rooms: dict[tuple[int, bool], _Room] = {}
        self._room_back: tuple[int, list[Tensor]] = (0, [])
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._pass = _Pass()
        self._q_gradient = torch.empty(0)
        self._shape = self._make_shape()
        self._forward = getattr(self.library, f"forward_{_name(self.precision)}")
        self.seconds = torch.zeros(3, dtype=torch.float64)
        self._call: _Call | None = None
        self._learn = getattr(self.library, f"learn_{_name(self.precision)}")
        self._backward_and_step = getattr(self.library, f"backward_and_step_{_name(self.precision)}")

    def _make_shape(self) -> _Shape:
        spec = self.network.spec
        largest = 0
        for index, conv in enumerate(self.convolutions):
            border = conv.kernel // conv.stride - 1 if index else 0
            bordered = (conv.down + 2 * border) * (conv.across + 2 * border) * conv.units
            largest = max(largest, conv.height * conv.width * conv.channels, bordered)
        most_places = 2 * max(conv.down * conv.across for conv in self.convolutions) + LARGEST_TILE
        scratch = max(6 * largest * 4 + 16 * most_places, 8 * self.flat * 4, self.hidden // self.pair * 32 * 4)
        scratch = max(scratch, *(layer.v[0].numel() * 4 for layer in self.layers))
        # The rows of 16 units of a convolution, twice, and the order of their inputs.
        scratch = max(
            scratch, *((2 * 16 + 1) * layer.v[0].numel() * 4 for layer in self.layers[: len(self.convolutions)])
        )
        return _Shape(
            len(self.convolutions),
            (_Convolution * MOST_CONVOLUTIONS)(*self.convolutions),
            spec.observation_shape[0],
            self.block,
            self.flat,
            self.hidden,
            self.actions,
            largest,
            most_places,
            scratch + 4096 - scratch % 4096,
        )

    def _weight_like(self, layer: _Layer) -> Tensor:
        dtype = torch.bfloat16 if layer.low else torch.float32
        return torch.zeros(layer.v.shape if isinstance(layer.module, nn.Linear) else layer.v.numel(), dtype=dtype)

    def _arrangement(self, struct: Any, index: int, layer: _Layer) -> dict[str, Tensor | None]:  # noqa: ANN401
        tensors: dict[str, Tensor | None] = {
            "work": self.working.weights[index],
            "bias_gradient": self._bias_gradients[index],
        }
        struct.unit_step = struct.gradient_unit_step = struct.inputs
        if index < len(self.convolutions):
            # Numbers of the inputs as (kernel, kernel, channels), then where each has its place in the working weight.
            conv = self.convolutions[index]
            numbers = torch.arange(struct.inputs).view(1, *layer.v.shape[1:])
            arranged = _arranged(layer.module, numbers)[0]  # type: ignore[arg-type]
            units, pair = conv.units, self.pair
            k = torch.arange(struct.inputs).view(arranged.shape)
            tensors["place"] = self._order(arranged, k // pair * pair * units + k % pair)
            struct.unit_step = pair
            tensors["gradient_place"] = self._order(arranged, k * units)
            struct.gradient_unit_step = 1
            if (back := self._back_weights[index]) is not None:
                taps = conv.kernel // conv.stride
                y, x, channel = torch.meshgrid(*(torch.arange(size) for size in arranged.shape), indexing="ij")
                within = y % conv.stride * conv.stride + x % conv.stride
                turned = (taps - 1 - y // conv.stride) * taps + taps - 1 - x // conv.stride
                start = (within * taps**2 + turned) * units * conv.channels
                tensors["back_place"] = self._order(arranged, start + channel * pair)
                struct.back_unit_step, struct.back_pair = conv.channels * pair, pair  # words pair units here
                tensors["back"] = back
        tensors["gradient"] = self._gradients[index]
        return tensors

    def _order(self, arranged: Tensor, place: Tensor) -> Tensor:
        """Return the place of each input in the order of what is trained; kept alive for the compiled code."""
        order = torch.empty(arranged.numel(), dtype=torch.int32)
        order[arranged.flatten()] = place.flatten().to(torch.int32)
        self._orders.append(order)
        return order

    @torch.no_grad()
    def working_copy(self, plain: QNetwork) -> Working:
        """Return working weights of a network of the same shape without parameterization, a folded target network."""
        copied = Working([], [])
        modules = (*plain.convolutions, plain.hidden, plain.output)
        for index, (module, layer) in enumerate(zip(modules, self.layers, strict=True)):
            w, b = module.weight, module.bias
            assert isinstance(w, Tensor)
            assert isinstance(b, Tensor)
            weight = self.working.weights[index]
            if isinstance(module, nn.Conv2d):
                # (units, k) as (k / pair, units, pair)
                rows = (_arranged(module, w).reshape(len(w), -1, self.pair) * layer.factor).transpose(0, 1)
                copied.weights.append(rows.reshape(-1).to(weight.dtype))
            else:
                copied.weights.append(w.to(weight.dtype, copy=True))
            copied.biases.append(b.float().clone())
        return copied

    def _room(self, batch: int, keep: bool) -> _Room:
        """Return memory for a pass over ``batch`` observations, as a rule the same at every call."""
        if (batch, keep) not in self._rooms:
            passing = [key for key in self._rooms if not key[1]]
            if not keep and len(passing) >= MOST_ROOMS:
                del self._rooms[passing[0]]
            groups = -(-batch // self.pair)
            flat = torch.empty(batch, self.flat, dtype=self.precision)
            seen: list[Tensor] = []
            if keep:
                words = [conv.height * conv.width * conv.channels for conv in self.convolutions]
                seen = [torch.empty(groups, count, dtype=torch.int32) for count in words]
                # Where a word is one number, the dense layer's input is what it saw.
                seen.append(flat if self.pair == 1 else torch.empty(groups, self.flat, dtype=torch.int32))
            lit = torch.empty(groups if keep else 0, self.convolutions[0].height, dtype=torch.int64)
            self._rooms[batch, keep] = _Room(seen, lit, flat, torch.empty(batch, self.hidden))
        return self._rooms[batch, keep]

    def _fill(self, given: _Pass, working: Working, seen: Seen, room: _Room, q_values: Tensor) -> None:
        dense = len(self.convolutions)
        for index in range(dense):
            given.weight[index] = working.weights[index].data_ptr()
            given.bias[index] = working.biases[index].data_ptr()
        for index in range(dense + 1):
            given.seen[index] = room.seen[index].data_ptr() if room.seen else None
        given.dense, given.dense_bias = working.weights[dense].data_ptr(), working.biases[dense].data_ptr()
        given.output, given.output_bias = working.weights[-1].data_ptr(), working.biases[-1].data_ptr()
        given.frames, given.places = seen.frames.data_ptr(), seen.places.data_ptr()
        given.batch, given.place_step = len(seen.places), seen.places.stride(0)
        given.lit = room.lit.data_ptr()
        given.flat, given.hidden, given.q_values = room.flat.data_ptr(), room.hidden.data_ptr(), q_values.data_ptr()

    def _threads(self) -> int:
        """Return the number of threads, for which there is then scratch."""
        threads = torch.get_num_threads()
        if self._scratch.numel() < threads * self._shape.scratch:
            self._scratch = torch.empty(threads * self._shape.scratch, dtype=torch.uint8)
        return threads

    def _run(self, passes: list[tuple[Working, Seen, bool]]) -> tuple[list[Tensor], ctypes.Array[_Pass]]:
        threads = self._threads()
        structs = (_Pass * len(passes))()
        made = []
        for struct, (working, seen, keep) in zip(structs, passes, strict=True):
            made.append(torch.empty(len(seen.places), self.actions))
            self._fill(struct, working, seen, self._room(len(seen.places), keep), made[-1])
        self._forward(ctypes.byref(self._shape), structs, len(passes), self._scratch.data_ptr(), threads)
        return made, structs

    @torch.no_grad()
    def forward(self, working: Working, observations: Tensor) -> tuple[Tensor, Any]:
        """Return Q-values, float32 (B, actions); nothing is kept for :meth:`backward`."""
        (q_values,), _ = self._run([(working, _of(observations), False)])
        return q_values, None

    @torch.no_grad()
    def compare(self, target: Working, batch: Minibatch) -> tuple[Tensor, Tensor, Any]:
        """Return the Q-values of the target network and of this one, and what its layers saw, until the next call.

        Frames that are still in the ring of the replay are read there.
        """
        if isinstance(batch, DrawnMinibatch):
            frames, places = batch.kept.frames, batch.places
            now, then = Seen(frames, places[:, :-1]), Seen(frames, places[:, 1:])
        else:
            now, then = _of(batch.observations), _of(batch.next_observations)
        (next_q_values, q_values), structs = self._run([(target, then, False), (self.working, now, True)])
        return next_q_values, q_values, structs[1]

    @torch.no_grad()
    def backward(self, seen: Any, q_gradient: Tensor) -> None:  # noqa: ANN401 - what compare returned
        """Keep the loss's gradient by the Q-values, (B, actions), for :meth:`step`, which does the rest."""
        self._pass, self._q_gradient = seen, q_gradient.contiguous()

    @torch.no_grad()
    def learn(
        self,
        target: Working,
        batch: Minibatch,
        loss: Loss,
        rates: Sequence[float],
        betas: tuple[float, float],
        eps: float,
    ) -> tuple[int, float]:
        """Make whole updates in one call: what :meth:`compare`, the loss, :meth:`backward` and :meth:`step` do.

        Args:
            target: the target network's working weights.
            batch: transitions, of all updates one after the other; drawn ones that nobody has looked at are looked up
                in the replay, others must be those of one update.
            loss: what is minimized.
            rates: of each update's Adamax step, without the bias of the first moment.
            betas: of all steps.
            eps: of all steps.

        Returns:
            How many updates were made, and the last loss. The first whose loss is not finite is not made, nor are
            those after it, unless the transitions have no numbers.

        Raises:
            IndexError: a transition has a number or an action that does not exist; no update was made.
            ValueError: the observations are not what the network takes, or fields differ in length.
        """
        drawn = batch if isinstance(batch, DrawnMinibatch) and batch.untouched else None
        numbers = None if drawn is None else drawn.numbers.long().contiguous()
        count = len(rates)
        size = len(batch.actions if numbers is None else numbers) // count
        if size * count != len(batch.actions if numbers is None else numbers) or (count > 1 and numbers is None):
            raise ValueError(f"the transitions cannot be dealt out to {count} updates")
        call = self._call
        if call is None or drawn is None or not call.serves(target, drawn.kept, size, loss):
            call = self._call = self._make_call(target, batch, drawn, size, loss)
        threads = self._threads()
        call.turn()
        last = ctypes.c_float()
        made: int = self._learn(
            ctypes.byref(self._shape),
            call.passes,
            None if call.store is None else ctypes.byref(call.store),
            None if numbers is None else numbers.data_ptr(),
            count,
            ctypes.byref(call.objective),
            ctypes.byref(call.back),
            self.structs,
            self._scratch.data_ptr(),
            threads,
            (ctypes.c_float * count)(*rates),
            *betas,
            eps,
            call.spare.data_ptr(),
            ctypes.byref(last),
        )
        if made % 2 == 0 or made < 0:
            call.turn()  # the last one left it in the other place, and where there was none the step before did
        if made < 0:
            raise IndexError("a transition has a number or an action that does not exist")
        if made:
            self._pass, self._q_gradient = call.passes[1], call.q_gradient
        return made, last.value

    def _make_call(
        self, target: Working, batch: Minibatch, drawn: DrawnMinibatch | None, size: int, loss: Loss
    ) -> _Call:
        store = None
        if drawn is not None:
            kept, stack = drawn.kept, len(drawn.kept.offsets) - 1
            places = torch.empty(size, stack + 1, dtype=torch.int64)
            then, now = Seen(kept.frames, places[:, 1:]), Seen(kept.frames, places[:, :-1])
            actions, rewards = torch.empty(size, dtype=torch.int64), torch.empty(size)
            terminals = torch.empty(size, dtype=torch.bool)
            tensors = (kept.entry_of, kept.age, kept.actions, kept.terminals, kept.rewards)
            store = _Store(*(tensor.data_ptr() for tensor in tensors), len(kept.age), kept.num_envs, stack)
            shape, sizes = (stack, *kept.frames.shape[1:]), {size}
        else:
            then, now = _of(batch.next_observations), _of(batch.observations)
            places = now.places
            actions, rewards = batch.actions.long().contiguous(), batch.rewards.float().contiguous()
            terminals = batch.terminals.bool().contiguous()
            shape = tuple(batch.observations.shape[1:])
            sizes = {size, len(rewards), len(terminals), len(then.places), len(now.places)}
        if shape != tuple(self.network.spec.observation_shape) or len(sizes) > 1:
            raise ValueError(f"a minibatch of {size} transitions with observations of {shape} does not fit the network")
        q_gradient = torch.empty(size, self.actions)
        structs = (_Pass * 2)()
        rooms = [self._room(size, keep) for keep in (False, True)]
        q_values = torch.empty(2, size, self.actions)
        for struct, working, seen, room, q in zip(
            structs, (target, self.working), (then, now), rooms, q_values, strict=True
        ):
            self._fill(struct, working, seen, room, q)
        given = (places, actions, rewards, terminals, q_gradient, loss.sums, self.seconds)
        settings = (loss.gamma, loss.reward_clip, loss.mean, batch.numbers is None)
        objective = _Objective(*(tensor.data_ptr() for tensor in given), *settings)
        back = self._make_back(q_gradient)
        alive = [q_values, *rooms, *given, *((then, now) if drawn is None else ())]
        kept_reference = None if drawn is None else weakref.ref(drawn.kept)
        return _Call(
            target,
            kept_reference,
            size,
            loss,
            structs,
            store,
            objective,
            back,
            q_gradient,
            rooms[1],
            torch.empty_like(rooms[1].flat),
            alive,
        )

    def _make_back(self, q_gradient: Tensor) -> _Back:
        """Return what the way back is told, with memory for as many observations."""
        batch, dense = len(q_gradient), len(self.convolutions)
        if self._room_back[0] != batch:
            self._call = None  # it refers to what is replaced
            groups = -(-batch // self.pair)
            words = [conv.down * conv.across * conv.units for conv in self.convolutions]
            self._room_back = (
                batch,
                [
                    torch.empty(batch, self.hidden, dtype=self.precision),
                    torch.empty(groups, self.hidden, dtype=torch.int32),
                    torch.empty(batch, self.flat),
                    *(torch.empty(groups, count, dtype=torch.int32) for count in words),
                ],
            )
        hidden, hidden_words, flat, *words_of = self._room_back[1]
        back = _Back()
        back.q_gradient = q_gradient.data_ptr()
        back.hidden, back.hidden_words, back.flat = hidden.data_ptr(), hidden_words.data_ptr(), flat.data_ptr()
        for index in range(dense):
            weight = self._back_weights[index]
            back.weight[index] = None if weight is None else weight.data_ptr()
            back.words[index] = words_of[index].data_ptr()
            gradient = self._gradients[index]
            assert gradient is not None
            back.gradient[index] = gradient.data_ptr()
            back.bias_gradient[index] = self._bias_gradients[index].data_ptr()
        return back

    def step(self, rate: float, betas: tuple[float, float], eps: float) -> None:
        """Go back through the layers and make an Adamax step; ``rate`` is without the bias of the first moment."""
        back, threads = self._make_back(self._q_gradient), self._threads()
        self._backward_and_step(
            ctypes.byref(self._shape),
            ctypes.byref(self._pass),
            ctypes.byref(back),
            self.structs,
            self._scratch.data_ptr(),
            threads,
            rate,
            *betas,
            eps,
        )

    @torch.no_grad()
    def write_gradients(self, moments: Callable[[nn.Parameter], Mapping[str, Tensor]], rate: float) -> None:
        """Write the gradients of the last step to ``.grad``, as :meth:`FusedNetwork.write_gradients`."""
        for layer, v_gradient, g_gradient, b_gradient in zip(
            self.layers, self.v_gradients, self.g_gradients, self._bias_gradients, strict=True
        ):
            layer.v.grad = self._dense_gradient(moments, rate) if v_gradient is None else v_gradient.clone()
            layer.b.grad = b_gradient.clone()
            if layer.g is not None:
                layer.g.grad = g_gradient.view_as(layer.g).clone()

    def _dense_gradient(self, moments: Callable[[nn.Parameter], Mapping[str, Tensor]], rate: float) -> Tensor:
        """Return the gradient of the dense hidden layer's v in the last step, found again from what the step left."""
        layer, g_gradient = self.layers[-2], self.g_gradients[-2][:, None]
        dense = self._room_back[1][0].float().t() @ self._room(len(self._q_gradient), True).flat.float()
        if layer.g is None:
            return dense

        def before(parameter: nn.Parameter) -> Tensor:
            state = moments(parameter)
            return parameter + rate * state["exp_avg"] / state["exp_inf"]

        v, g = before(layer.v), before(layer.g).view(-1, 1)
        norm = v.norm(dim=1, keepdim=True)
        gradient: Tensor = g / norm * dense - g * g_gradient / norm**2 * v
        return gradient
