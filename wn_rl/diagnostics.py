"""What goes on inside a network while it trains: norms, effective learning rates, dormant units, rank, noise, bias.

Pure functions: each leaves parameters, buffers, modes and hooks as it found them. They are computed when a point of the
curves is written, not at every update, and they wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from wn_rl.parameterizations.base import CONVOLUTIONS, TRANSPOSED
from wn_rl.parameterizations.projected import Projected
from wn_rl.parameterizations.spectral_norm import SpectralNormalized
from wn_rl.parameterizations.weight_norm import WeightNormalized, direction_and_scale

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from wn_rl.networks import Network

DORMANT_FRACTION = "diagnostics/dormant_fraction"
SRANK = "diagnostics/srank"
Q_NOISE = "diagnostics/q_noise_across_minibatches"
OVERESTIMATION = "diagnostics/overestimation"
DIAGNOSTIC_TAGS = {
    "layers/LAYER/w_norm": "2-norm of the layer's weight w, all its units together",
    "layers/LAYER/v_norm": "2-norm of the trained v behind w, all units together (entries that train a v)",
    "layers/LAYER/g_mean": "mean of |g| over the layer's units, of the gain for bn and ln (entries that have one)",
    "layers/LAYER/gradient_norm": "2-norm of the last update's gradient of all the layer's trained parameters",
    "layers/LAYER/effective_learning_rate": "relative change of w in one update, norm of the change / norm of w",
    DORMANT_FRACTION: "fraction of dormant units in all hidden layers together (score at most 0.025), 0 to 1",
    SRANK: "effective rank of the features before the output layer (delta 0.01), count of singular values",
    Q_NOISE: "standard deviation of a state's Q-value over minibatches it may be in, mean, clipped-reward units",
    OVERESTIMATION: "mean of max-Q minus realized discounted return in evaluation, clipped-reward units",
}
"""Every tag and what it holds; LAYER stands for a layer's name in the model, such as ``convolutions.0``."""
DORMANT_THRESHOLD = 0.025
"""Score up to which a unit counts as dormant."""
PROBE_STATES = 4
"""States on which :func:`collect` measures noise across minibatches; few, since they are in the statistics too."""

_LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


# --- tags --------------------------------------------------------------------------------------------------------


def layer_tag(layer: str, quantity: str) -> str:
    """Return the tag of a layer's ``quantity``, e.g. ``layers/hidden/w_norm``.

    Raises:
        KeyError: :data:`DIAGNOSTIC_TAGS` has no such quantity of a layer.
    """
    if (pattern := f"layers/LAYER/{quantity}") not in DIAGNOSTIC_TAGS:
        raise KeyError(pattern)
    return f"layers/{layer}/{quantity}"


def meaning(tag: str) -> str:
    """Return what :data:`DIAGNOSTIC_TAGS` says about ``tag``, whichever layer it names.

    Raises:
        KeyError: there is no such tag.
    """
    if tag in DIAGNOSTIC_TAGS and "LAYER" not in tag:
        return DIAGNOSTIC_TAGS[tag]
    kind, _, rest = tag.partition("/")
    layer, _, quantity = rest.rpartition("/")
    if kind != "layers" or not layer:
        raise KeyError(tag)
    return DIAGNOSTIC_TAGS[f"layers/LAYER/{quantity}"]


def effective_learning_rate_tags(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Return :func:`effective_learning_rates` under their tags."""
    rates = effective_learning_rates(before, model)
    return {layer_tag(layer, "effective_learning_rate"): rate for layer, rate in rates.items()}


def collect(
    network: Network, observations: Tensor, minibatches: Sequence[Tensor], *, probe_states: int = PROBE_STATES
) -> dict[str, float]:
    """Return all that can be said from a network and some observations, by the tags of :data:`DIAGNOSTIC_TAGS`.

    The caller adds effective learning rates and overestimation. What is not known is NaN: gradients before the first
    update, what depends on features that are not finite, noise with less than two minibatches. A layer has no tag for a
    quantity that its parameterization does not have.

    Args:
        network: after an update, for its gradients.
        observations: held out, the same ones each time; uint8, shape (B, 4, 84, 84). The rank is at most B, so take as
            many as there are hidden units.
        minibatches: of observations, all of one shape; uint8, shape (32, 4, 84, 84). See :func:`batch_noise`.
        probe_states: how many of ``observations``, from the first, the noise is measured on.
    """
    values: dict[str, float] = {}
    for layer, norms in layer_norms(network).items():
        values |= {layer_tag(layer, quantity): norm for quantity, norm in norms.items()}
    values |= {layer_tag(layer, "gradient_norm"): norm for layer, norm in gradient_norms(network).items()}
    features, activity = _hidden_pass(network, observations)
    dormant = [_dormant(units, DORMANT_THRESHOLD) for units in activity.values()]
    finite = bool(features.isfinite().all())
    values[DORMANT_FRACTION] = _fraction(torch.cat(dormant)) if finite and dormant else math.nan
    values[SRANK] = float(srank(features)) if finite else math.nan
    enough = len(minibatches) > 1
    values[Q_NOISE] = batch_noise(network, observations[:probe_states], minibatches) if enough else math.nan
    return values


# --- weights and gradients ---------------------------------------------------------------------------------------


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put ``model`` into training or evaluation mode and each of its modules back into its own afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}


def _weight(layer: nn.Module) -> Tensor:
    """Return w; in training mode reading it would advance the power iteration of spectral normalization."""
    with _mode(layer, training=False):
        weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _direction(layer: nn.Module) -> Tensor | None:
    """Return the trained v behind a layer's weight, None where w itself is trained."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    slot = layer.parametrizations["weight"]  # type: ignore[index]
    assert isinstance(slot, parametrize.ParametrizationList)
    parametrization = slot[0]
    if isinstance(parametrization, WeightNormalized):
        return direction_and_scale(layer)[0]
    v: object = None
    if isinstance(parametrization, Projected):
        v = slot.original1 if parametrization.has_scale else slot.original
    elif isinstance(parametrization, SpectralNormalized):
        v = slot.original
    return v if isinstance(v, Tensor) else None


def _scale(layer: nn.Module) -> Tensor | None:
    """Return a layer's g, not its logarithm, or the gain of its normalization; None where it has neither."""
    g = getattr(layer._modules.get("normalization"), "gain", None)
    if parametrize.is_parametrized(layer, "weight"):
        slot = layer.parametrizations["weight"]  # type: ignore[index]
        assert isinstance(slot, parametrize.ParametrizationList)
        parametrization = slot[0]
        if isinstance(parametrization, WeightNormalized):
            g = direction_and_scale(layer)[1]
            g = g.exp() if parametrization.exponential else g
        elif isinstance(parametrization, Projected) and parametrization.has_scale:
            g = slot.original0
    return g if isinstance(g, Tensor) else None


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


@torch.no_grad()
def layer_norms(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the norms of each Linear and convolution of ``model``, treated or not, by the layer's name.

    With weight normalization ‖v‖ grows with every step of plain gradient descent, since the gradient is orthogonal to
    v, and the step's effect on the direction of w falls with 1/‖v‖² (Salimans & Kingma 2016, section 2.1).

    Returns:
        For each layer: ``w_norm``, the 2-norm of the weight w that multiplies the layer's input, all units together;
        where there is a trained v behind it (``wn``, ``wn_mean_only_bn``, ``wn_projected``, ``sn``) ``v_norm``, the
        same of v; and where there is a scale per unit ``g_mean``, the mean of its absolute value over the units. The
        scale is g, not log g, or the gain γ of ``bn`` and ``ln``. What stands behind a layer, γ included, is no part
        of w. All in the units of the weights.
    """
    norms = {}
    for name, layer in _layers(model).items():
        v, g = _direction(layer), _scale(layer)
        norms[name] = {"w_norm": _norm(_weight(layer))}
        if v is not None:
            norms[name]["v_norm"] = _norm(v)
        if g is not None:
            norms[name]["g_mean"] = float(g.abs().mean())
    return norms


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the gradient's 2-norm for each Linear and convolution of ``model``, by the layer's name.

    Over all that the layer trains: w or v, g, bias and gain together, so that the squares over a Q-network's layers sum
    to that of ``train/gradient_norm``. In units of loss per unit of parameter. NaN for a layer without any gradient.
    """
    norms = {}
    for name, layer in _layers(model).items():
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        norms[name] = float(nn.utils.get_total_norm(gradients)) if gradients else math.nan
    return norms


@torch.no_grad()
def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weight w of each Linear and convolution of ``model``, by the layer's name."""
    return {name: _weight(layer).detach().clone() for name, layer in _layers(model).items()}


@torch.no_grad()
def effective_learning_rates(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Return the relative change of each layer's weight, ‖w − w before‖ / ‖w before‖, without unit.

    Taken over one update it tells how fast a layer really learns, whatever the parameterization makes of the learning
    rate. For plain gradient descent where a normalization of the outputs follows, it is the effective learning rate
    η/‖w‖² of van Laarhoven 2017 ("L2 regularization versus batch and weight normalization") times the gradient's norm
    at w/‖w‖; only the direction of w matters there.

    Args:
        before: what :func:`weights` returned before the update.
        model: the same model after it.

    Returns:
        By the names in ``before``; NaN for a layer whose weight was all zero.
    """
    layers = _layers(model)
    rates = {}
    for name, w in before.items():
        norm = _norm(w)
        rates[name] = _norm(_weight(layers[name]) - w) / norm if norm else math.nan
    return rates


# --- activations -------------------------------------------------------------------------------------------------


def _activity(activations: Tensor) -> Tensor:
    """Return the mean of |h| for each unit, over examples and positions, shape (units,)."""
    size = activations.abs()
    # Positions first: they are next to each other in memory.
    return (size.flatten(2).mean(2) if size.dim() > 2 else size).mean(0, dtype=torch.float64)


def _dormant(activity: Tensor, threshold: float) -> Tensor:
    """Return which units are dormant; multiplied out, the definition also holds for a layer that is all zero."""
    return activity <= threshold * activity.mean()


def _fraction(truth: Tensor) -> float:
    return float(truth.double().mean())


@torch.no_grad()
def _hidden_pass(network: Network, observations: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the features, shape (B, hidden units), and the mean activity of every hidden layer's units.

    The hidden layers are those that give the features, and :meth:`~wn_rl.networks.Network.activation`, a ReLU, follows
    each. Only means are kept: the activations of the first convolution are larger than the network.
    """
    activity: dict[str, Tensor] = {}
    handles = []

    def note(name: str, layer: nn.Module) -> None:
        def after(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            activity[name] = _activity(network.activation(output))

        handles.append(layer.register_forward_hook(after))

    try:
        for name, layer in _layers(network).items():
            note(name, layer)
        with _mode(network, training=False):
            features = network.features(observations)
    finally:
        for handle in handles:
            handle.remove()
    return features, activity


@torch.no_grad()
def dormant_fraction(activations: Tensor, threshold: float = DORMANT_THRESHOLD) -> float:
    """Return the fraction of a layer's units that are dormant, from 0 to 1.

    Sokar et al. 2023, "The dormant neuron phenomenon in deep reinforcement learning", section 3: a unit's score is its
    mean absolute activation, divided by the mean of that over the layer's units; it is τ-dormant if its score is at
    most τ. A convolution's unit is a channel, averaged over examples and positions, as in the authors' code (Dopamine,
    ``labs/redo/weight_recyclers.py``). All units of a layer that is all zero are dormant.

    Args:
        activations: after the nonlinearity, shape (B, units) or (B, channels, height, width).
        threshold: τ.
    """
    return _fraction(_dormant(_activity(activations), threshold))


def dormant_fractions(network: Network, observations: Tensor, threshold: float = DORMANT_THRESHOLD) -> dict[str, float]:
    """Return :func:`dormant_fraction` of each hidden layer of a Q-network in evaluation mode, by the layer's name.

    Args:
        network: its hidden layers are those before the output layer, each with its activation.
        observations: uint8, shape (B, 4, 84, 84).
        threshold: τ.

    Returns:
        Also, under ``all``, the fraction over the units of all hidden layers together. Scores are relative to each
        unit's own layer there as well.
    """
    _, activity = _hidden_pass(network, observations)
    dormant = {name: _dormant(units, threshold) for name, units in activity.items()}
    every = torch.cat([*dormant.values()])
    return {name: _fraction(units) for name, units in (*dormant.items(), ("all", every))}


@torch.no_grad()
def srank(features: Tensor, delta: float = 0.01) -> int:
    """Return the effective rank of features: how many singular values hold 1 − δ of the sum of all.

    Kumar et al. 2021, "Implicit under-parameterization inhibits data-efficient deep reinforcement learning": the
    smallest k such that the k largest singular values make up at least 1 − δ of their sum. 0 for a matrix of zeros.

    Args:
        features: finite, shape (B, D); the result is at most the smaller of the two.
        delta: δ; the authors' is 0.01.
    """
    if features.numel() == 0:
        return 0
    # Half precision has no SVD; in double precision small values of delta mean what they say.
    sums = torch.linalg.svdvals(features.double()).cumsum(0)
    total = sums[-1]
    return int((sums < (1 - delta) * total).sum()) + 1 if total > 0 else 0


# --- Q-values ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def batch_noise(network: nn.Module, states: Tensor, minibatches: Sequence[Tensor]) -> float:
    """Return how much a state's Q-values in training mode depend on the minibatch that it is in.

    Salimans & Kingma 2016 call deep reinforcement learning sensitive to the noise of batch normalization; this measures
    it. The states are put before each minibatch in turn and their Q-values compared. Every forward pass starts from the
    same buffers.

    The result is 0 for a parameterization whose outputs do not depend on the minibatch: the states are always at the
    same positions of a batch of the same size, where equal inputs give bit-exact outputs. A library whose rounding
    depends on the other examples would show here as it would in training.

    Args:
        network: gives Q-values, shape (B, actions).
        states: P observations, uint8, shape (P, 4, 84, 84). They are part of every batch and damp its noise, so take
            far fewer than a minibatch has.
        minibatches: at least two, of one shape; uint8, shape (B, 4, 84, 84).

    Returns:
        The standard deviation (n − 1) over the minibatches, averaged over states and actions, in units of the Q-value.

    Raises:
        ValueError: less than two minibatches, or of unequal sizes.
    """
    if len(minibatches) < 2 or len({minibatch.shape for minibatch in minibatches}) > 1:
        raise ValueError("noise across minibatches needs two or more of the same shape")
    q_values = []
    with _mode(network, training=True):
        for minibatch in minibatches:
            # The pass writes to these copies instead of the network's own buffers.
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            q = functional_call(network, buffers, (torch.cat([states, minibatch]),))
            q_values.append(q[: len(states)].double())
    # Of differences, so that equal Q-values give exactly 0.
    return float((torch.stack(q_values) - q_values[0]).std(0).mean())


def discounted_returns(rewards: Tensor | ArrayLike, gamma: float) -> Tensor:
    """Return G_t = Σ_k γ^k r_{t+k} for every step t of one complete episode, float64, shape (T,).

    Args:
        rewards: of the episode's steps, clipped as in learning, shape (T,).
        gamma: discount per agent step.
    """
    total = 0.0
    returns = []
    for reward in reversed(torch.as_tensor(rewards, dtype=torch.float64).tolist()):
        total = reward + gamma * total
        returns.append(total)
    return torch.tensor(returns[::-1], dtype=torch.float64)


def overestimation(
    max_q: Tensor | ArrayLike, rewards: Tensor | ArrayLike, ends: Tensor | ArrayLike, gamma: float
) -> float:
    """Return the mean of max_a Q(s_t, a) − G_t over the visited states, in clipped-reward units.

    What the network promised against what its own play then brought (van Hasselt et al. 2016, "Deep reinforcement
    learning with double Q-learning"). Positive: too high. The play's own share of random actions lowers G_t, so a
    small positive value is no error of the network.

    A truncated episode has no known return: the caller leaves it out. Where learning takes a lost life for the end of
    the episode, so must ``ends``, or Q-values that are right look too low.

    Args:
        max_q: the largest Q-value of each visited state, shape (T,); the steps of one episode after another's.
        rewards: that followed, clipped as in learning, shape (T,).
        ends: bool, true at the last step of each episode, shape (T,).
        gamma: discount per agent step.

    Returns:
        NaN where there is no state.

    Raises:
        ValueError: the three are not of one shape, or the last step does not end its episode.
    """
    promised, clipped = (torch.as_tensor(values, dtype=torch.float64).cpu() for values in (max_q, rewards))
    last = torch.as_tensor(ends, dtype=torch.bool).cpu()
    if not (promised.shape == clipped.shape == last.shape and promised.dim() == 1):
        raise ValueError("max-Q, rewards and ends must be of one shape (T,)")
    if len(last) == 0:
        return math.nan
    if not last[-1]:
        raise ValueError("the last episode is not complete")
    episodes = clipped.tensor_split(last.nonzero().flatten()[:-1] + 1)
    realized = torch.cat([discounted_returns(episode, gamma) for episode in episodes])
    return float((promised - realized).mean())
