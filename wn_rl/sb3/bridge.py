"""Any parameterization inside a Stable-Baselines3 policy, and its initialization from the model's environment.

Stable-Baselines3: Raffin et al. 2021, JMLR 22(268). ``DQN``, ``PPO``, ``A2C``, and ``QRDQN`` of sb3-contrib::

    model = DQN("CnnPolicy", env, policy_kwargs=policy_kwargs("wn"))
    initialize_from_env(model)
    model.learn(1_000_000)
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wn_rl.parameterizations import Parameterization, initialize_from_data, project, reparameterize, resolve
from wn_rl.parameterizations.api import LayerInit, as_choices, treated_layers
from wn_rl.parameterizations.base import LAYERS
from wn_rl.sb3.loading import PlainLoading, accept_plain_weights, blank_layers, refuse_after_fold

try:
    from stable_baselines3 import A2C
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.policies import BasePolicy
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as error:
    if error.name != "stable_baselines3":  # it is there, and misses something of its own
        raise
    raise ImportError("wn_rl.sb3 needs Stable-Baselines3: pip install stable-baselines3") from None

_LOAD = BaseAlgorithm.load.__func__.__code__  # type: ignore[attr-defined]
OptimizerFactory = Callable[..., torch.optim.Optimizer]
LayerChoice = str | type[nn.Module]
"""Layers of a policy that is still to be built: a name with ``*`` and ``?``, or a type."""
Observations = NDArray[Any] | dict[str, NDArray[Any]]


class PolicyKwargs(dict[str, Any]):
    """``policy_kwargs`` that also equal those of a model without parameterization, so that its file loads into them.

    ``load(policy_kwargs=...)`` wants them equal to the saved ones. The optimizer may be another: its moments are not
    taken over anyway.
    """

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        """Compare with saved ``policy_kwargs``."""
        if not isinstance(other, dict):
            return NotImplemented
        if isinstance(other.get("optimizer_class"), ReparameterizeThenOptimize):
            return dict(self) == other
        return _without_optimizer(self) == _without_optimizer(other)

    def __ne__(self, other: object) -> bool:
        """Negate ``==``, which a dictionary does not do by itself."""
        equal = self == other
        return not equal


def _without_optimizer(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("optimizer_class", "optimizer_kwargs")}


def policy_kwargs(
    param: str | Parameterization,
    *,
    include: Iterable[LayerChoice] | None = None,
    exclude: Iterable[LayerChoice] = (),
    options: Mapping[str, Any] | None = None,
    optimizer_class: OptimizerFactory | None = None,
    optimizer_kwargs: dict[str, Any] | None = None,
    **others: Any,  # noqa: ANN401 - whatever the policy takes
) -> dict[str, Any]:
    """Return ``policy_kwargs`` with which a Stable-Baselines3 model trains a parameterization.

    The networks of the policy are reparameterized when it is built, target network included, and again whenever it is
    rebuilt by ``load``. Layers are named as inside ``q_net`` or ``quantile_net`` (``features_extractor.cnn.0``,
    ``q_net.2``), for actor-critic policies as in the policy (``mlp_extractor.policy_net.0``, ``action_net``).

    The file of a model without parameterization loads too, by ``set_parameters`` or by ``DQN.load(path,
    policy_kwargs=policy_kwargs("wn"))`` with the other ``policy_kwargs`` of that model; so does one that was saved
    after ``wn_rl.fold(model.policy)``. The layers get parameters that give the loaded weights, and the optimizer
    starts without moments. ``ln`` refuses plain weights, since it cannot compute what they did.

    A deep copy of a policy has an optimizer without hooks, as torch makes them: a parameterization that projects
    (``wn_projected``) is then no longer projected. ``save`` and ``load`` keep it.

    Args:
        param: a registered name, or a :class:`Parameterization`.
        include: only these layers: names with ``*`` and ``?``, or types; default: those of the parameterization's
            source (``wn``: all; ``ln`` and ``wn_projected``: all but the heads; ``sn``: the one before each head).
        exclude: not these.
        options: of the parameterization, where a name is given.
        optimizer_class: what trains the new parameters; default: what the algorithm has without this function,
            RMSprop for ``A2C`` unless ``use_rms_prop=False``, else Adam, each with the algorithm's own settings.
        optimizer_kwargs: of the optimizer, except the learning rate.
        others: other ``policy_kwargs``, e.g. ``net_arch=[64, 64]``.

    Raises:
        ValueError: no parameterization has this name, or it has no such option. Where the model is built: a choice that
            matches no layer, a layer that cannot be treated, or another kind of policy.
    """
    build = ReparameterizeThenOptimize(
        resolve(param, options),
        None if include is None else cast(tuple[LayerChoice, ...], tuple(as_choices(include))),
        cast(tuple[LayerChoice, ...], tuple(as_choices(exclude))),
        optimizer_class,
    )
    if optimizer_kwargs is not None:
        others["optimizer_kwargs"] = optimizer_kwargs
    return PolicyKwargs({**others, "optimizer_class": build})


@dataclass(frozen=True, eq=False)
class ReparameterizeThenOptimize:
    """What stands in ``policy_kwargs["optimizer_class"]``.

    Building its optimizer is the last thing that a policy does, after initial weights and target network, and it is
    the only step that ``policy_kwargs`` can reach. So the policy is reparameterized there.

    Attributes:
        parameterization: for the chosen layers.
        include: see :func:`policy_kwargs`.
        exclude: see :func:`policy_kwargs`.
        inner: the optimizer that was asked for, None for the algorithm's default.
        settled: the optimizer with which a policy was built, and its settings. A loaded model needs it: nothing else
            that is saved says which optimizer ``A2C`` had.
    """

    parameterization: Parameterization
    include: tuple[LayerChoice, ...] | None = None
    exclude: tuple[LayerChoice, ...] = ()
    inner: OptimizerFactory | None = None
    settled: tuple[OptimizerFactory, dict[str, Any]] | None = None

    def __eq__(self, other: object) -> bool:
        """Compare what was asked for: ``load(policy_kwargs=...)`` wants them equal to the saved ones."""
        if not isinstance(other, ReparameterizeThenOptimize):
            return NotImplemented
        return self._asked() == other._asked()

    def __str__(self) -> str:
        """Return the parameterization as JSON: ``save`` writes it beside the pickle, for readers that execute none."""
        parameterization = self.parameterization
        return json.dumps({"parameterization": parameterization.name, "options": parameterization.options()})

    def _asked(self) -> tuple[object, ...]:
        parameterization = self.parameterization
        return type(parameterization), parameterization.options(), self.include, self.exclude, self.inner

    def __call__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:  # noqa: ANN401
        """Reparameterize the policy that is being built and return the optimizer of its new parameters.

        Args:
            parameters: not used, since they may be the ones from before.
            settings: of the optimizer.

        Raises:
            RuntimeError: no policy is being built.
            ValueError: see :func:`policy_kwargs`.
        """
        policy, algorithm, arguments, saved = self._builders()
        online, target = _networks(policy)
        if treated_layers(online):
            raise ValueError(f"{type(policy).__name__} builds its optimizer twice, which policy_kwargs() cannot follow")
        loading = PlainLoading()
        self._treat(online, loading)
        if target is not None:
            self._treat(target)
            target.load_state_dict(online.state_dict())
        given = settings.keys() - {"lr"}
        inner, defaults = self.settled or self._settle(policy, algorithm, arguments, saved, given)
        # The policy and the model save this; the caller's dictionary stays as it was, to be used for other models.
        settled = replace(self, settled=(inner, defaults))
        policy.optimizer_class = settled  # type: ignore[assignment]
        if algorithm is not None:
            algorithm.policy_kwargs = {**algorithm.policy_kwargs, "optimizer_class": settled}
        optimizer = inner(online.parameters(), **{**defaults, **settings})
        optimizer.register_load_state_dict_pre_hook(loading.start_anew)
        optimizer.register_step_pre_hook(refuse_after_fold(online))
        if self.parameterization.projects:
            optimizer.register_step_post_hook(lambda *_: project(online))
        return optimizer

    def _builders(self) -> tuple[BasePolicy, BaseAlgorithm | None, Mapping[str, Any], Mapping[str, Any] | None]:
        """Return the policy being built, the algorithm that builds it, what an ``A2C`` was given, what a file holds.

        The last are saved ``policy_kwargs``, None where no file is being loaded. All are looked for in the calls under
        way: an optimizer's class is told none of them.
        """
        policy: BasePolicy | None = None
        algorithm: BaseAlgorithm | None = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if policy is None:
                policy = owner if isinstance(owner, BasePolicy) else None
            elif isinstance(owner, BaseAlgorithm) and self._is_in(owner):
                algorithm = owner
                if frame.f_code is A2C.__init__.__code__:
                    return policy, algorithm, dict(frame.f_locals), None
            elif frame.f_code is _LOAD and algorithm is not None and frame.f_locals.get("model") is algorithm:
                return policy, algorithm, {}, frame.f_locals["data"]["policy_kwargs"]
            frame = frame.f_back
        if policy is None:
            raise RuntimeError("no Stable-Baselines3 policy is being built: give policy_kwargs() to a model, e.g. DQN")
        return policy, algorithm, {}, None

    def _is_in(self, algorithm: BaseAlgorithm) -> bool:
        """Return whether the algorithm has this object: another one may be running that builds no policy."""
        held: dict[str, Any] | None = getattr(algorithm, "policy_kwargs", None)
        return held is not None and held.get("optimizer_class") is self

    def _treat(self, network: nn.Module, loading: PlainLoading | None = None) -> None:
        blanks = blank_layers(network)
        include: list[Any] | None = None if self.include is None else list(self.include)
        exclude: list[Any] = list(self.exclude)
        treats = "all" if self.include is not None else self.parameterization.default_layers
        if treats == "penultimate":
            include = [layer for path in _paths(network) for layer in path[-2:-1]]
        elif treats == "hidden":
            exclude += [head for path in _paths(network) for head in path[-1:]]
        reparameterize(network, self.parameterization, include=include, exclude=exclude)
        if not treated_layers(network):
            raise ValueError(f"'{self.parameterization.name}' treats no layer of this policy; include= chooses some")
        accept_plain_weights(network, blanks, loading)
        network.train(network.training)  # for the modules that are new

    def _settle(
        self,
        policy: BasePolicy,
        algorithm: BaseAlgorithm | None,
        arguments: Mapping[str, Any],
        saved: Mapping[str, Any] | None,
        given: Iterable[str],
    ) -> tuple[OptimizerFactory, dict[str, Any]]:
        """Return the optimizer and the settings that the algorithm has when ``policy_kwargs`` names none.

        Algorithms and policies look for ``optimizer_class`` there, and would leave theirs out since they find this.
        """
        inner = self.inner
        if saved is not None and not isinstance(saved.get("optimizer_class"), ReparameterizeThenOptimize):
            theirs: OptimizerFactory = saved.get("optimizer_class", torch.optim.Adam)
            if inner in (None, theirs) and saved.get("optimizer_kwargs") and not given:
                return theirs, dict(saved["optimizer_kwargs"])
            inner = inner or theirs  # where the model was built, A2C and QR-DQN wrote theirs there
        if inner is None and isinstance(algorithm, A2C) and arguments.get("use_rms_prop", True):
            eps = arguments.get("rms_prop_eps", 1e-5)
            return torch.optim.RMSprop, {"alpha": 0.99, "eps": eps, "weight_decay": 0}
        if inner is None and algorithm is not None and hasattr(policy, "quantile_net"):
            return torch.optim.Adam, {"eps": 0.01 / algorithm.batch_size}  # type: ignore[attr-defined]
        inner = inner or torch.optim.Adam
        actor_critic = hasattr(policy, "action_net")
        return inner, {"eps": 1e-5} if actor_critic and inner is torch.optim.Adam and not given else {}


def _networks(policy: BasePolicy) -> tuple[nn.Module, nn.Module | None]:
    """Return the trained network of a policy, and its target network if it has one."""
    for name in ("q_net", "quantile_net"):
        online, target = getattr(policy, name, None), getattr(policy, f"{name}_target", None)
        if isinstance(online, nn.Module) and isinstance(target, nn.Module):
            return online, target
    if all(hasattr(policy, name) for name in ("mlp_extractor", "action_net", "value_net")):
        return policy, None
    raise ValueError(f"{type(policy).__name__} is no policy of DQN, QR-DQN, PPO or A2C, so its networks are not known")


def _paths(network: nn.Module) -> list[list[nn.Module]]:
    """Return the layers from input to output, once for each head, which comes last."""
    parts: list[list[Any]] = [[network]]
    if hasattr(network, "action_net"):
        policy: Any = network
        actor = [policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net]
        critic = [policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net]
        parts = [actor, critic]
    return [[layer for part in path for layer in part.modules() if isinstance(layer, LAYERS)] for path in parts]


def initialize_from_env(
    model: BaseAlgorithm,
    num_samples: int = 512,
    *,
    output_std: float = 0.1,
    action_std: float = 0.01,
    seed: int | None = None,
) -> dict[str, LayerInit]:
    """Initialize a model's network from observations of its own environment, under random actions.

    Each pre-activation gets mean 0 and standard deviation 1 over the observations, those of the heads a smaller one
    (Salimans & Kingma 2016, section 3; see :func:`wn_rl.initialize_from_data`). A target network becomes a copy.

    Call it before ``learn``, which starts with a reset as it does otherwise; a model with a seed seeds its environment
    anew. What the environment itself records goes on: a ``Monitor``'s episodes, and the statistics of a
    ``VecNormalize``, which sees as many steps before, so that observations are normalized as ``learn`` will find them.

    Args:
        model: built with :func:`policy_kwargs`, with an environment.
        num_samples: observations, at least 2.
        output_std: of the heads that give values: Q-values, quantiles, state values.
        action_std: of an actor's head; Stable-Baselines3 initializes its weights with gain 0.01, so that all actions
            are about as likely at first.
        seed: of the random actions and the environment; default: the model's.

    Returns:
        By layer name, the statistics that were found.

    Raises:
        ValueError: a model without parameterization or environment, too few samples, observations that are all the
            same, or a layer that cannot be initialized from data (without bias, recurrent, or used twice).
        TypeError: the parameterization has no scale to initialize.
    """
    policy = model.policy
    online, target = _networks(policy)
    treated = treated_layers(online)
    env = model.get_env()
    if not treated:
        raise ValueError("the model carries no parameterization: build it with policy_kwargs=policy_kwargs(...)")
    if env is None:
        raise ValueError("the model has no environment: set_env() gives it one")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, not {num_samples}")
    stds = [action_std, output_std] if target is None else [output_std]
    heads = {id(head): std for path, std in zip(_paths(online), stds, strict=True) for head in path[-1:]}
    std_of = {name: heads[id(layer)] for name, (layer, _) in treated.items() if id(layer) in heads}
    try:
        played = _play(model, env, num_samples, seed)
    finally:
        model._last_obs = None  # learn() resets the environment
        if model.seed is not None:
            env.seed(model.seed)
    arrays = played.values() if isinstance(played, dict) else [played]
    if all(bool((array == array[:1]).all()) for array in arrays):
        raise ValueError("random actions show one and the same observation, which says nothing about the scale")
    observations, _ = policy.obs_to_tensor(played)
    training = policy.training
    policy.set_training_mode(False)  # power iteration and dropout rest; batch statistics are those of the observations
    try:
        # An actor-critic policy would draw an action, which changes torch's random state.
        found = initialize_from_data(online, observations, *([True] if target is None else []), std_of=std_of)
    finally:
        policy.set_training_mode(training)
    if target is not None:
        target.load_state_dict(online.state_dict())
    return found


def _play(model: BaseAlgorithm, env: VecEnv, num_samples: int, seed: int | None) -> Observations:
    """Return observations under random actions, as the policy gets them."""
    actions = copy.deepcopy(env.action_space)  # the model's own goes on where it was
    actions.seed(model.seed if seed is None else seed)
    if seed is not None:
        env.seed(seed)

    def play() -> list[Observations]:
        seen = [cast(Observations, copy.deepcopy(env.reset()))]
        while len(seen) * env.num_envs < num_samples:
            after, *_ = env.step(np.array([actions.sample() for _ in range(env.num_envs)]))
            seen.append(cast(Observations, copy.deepcopy(after)))  # an environment may write the next one over it
        return seen

    normalize = model.get_vec_normalize_env()
    if normalize is None or not normalize.training:
        return _joined(play(), num_samples)
    play()
    normalize.training = False
    try:
        return _joined(play(), num_samples)
    finally:
        normalize.training = True


def _joined(seen: list[Observations], num_samples: int) -> Observations:
    arrays = [entry for entry in seen if not isinstance(entry, dict)]
    if arrays:
        return np.concatenate(arrays)[:num_samples]
    keyed = [entry for entry in seen if isinstance(entry, dict)]
    return {key: np.concatenate([entry[key] for entry in keyed])[:num_samples] for key in keyed[0]}
