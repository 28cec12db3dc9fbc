"""Networks of somebody's own, good and bad, as a file that lies where they are: tests write it out and import it."""

from __future__ import annotations

SOURCE = '''
import torch
from torch import nn
from wn_rl.networks import Network, register

print("imported", end="")


class Small(Network):
    """One convolution, one dense layer."""

    def __init__(self, spec, *, width: int = 4, bias: bool = True):
        super().__init__(spec)
        if width < 1:
            raise ValueError("width must be at least 1")
        self.conv = nn.Conv2d(spec.observation_shape[0], width, 8, 8, bias=bias)  # 84 -> 10 pixels
        self.hidden = nn.Linear(width * 100, 8)
        self.output = nn.Linear(8, spec.num_actions)

    def features(self, observations):
        x = self.conv(self.pixels(observations)).relu()
        return self.hidden(x.flatten(1)).relu()


Small = register("small")(Small)


class Unregistered(Small):
    pass


class Plain(nn.Module):
    pass


def bad(name):
    return register(name)


@bad("wrong_shape")
class WrongShape(Small):
    def __init__(self, spec):
        super().__init__(spec)
        self.output = nn.Linear(8, 6)


@bad("raises")
class Raises(Small):
    def __init__(self, spec):
        raise RuntimeError("on purpose")


@bad("no_output")
class NoOutput(Network):
    def __init__(self, spec):
        super().__init__(spec)
        self.head = nn.Linear(8, spec.num_actions)


@bad("no_features")
class NoFeatures(Network):
    def __init__(self, spec):
        super().__init__(spec)
        self.output = nn.Linear(8, spec.num_actions)


@bad("unflat")
class Unflat(Small):
    def features(self, observations):
        return super().features(observations)[:, None]


@bad("drops_out")
class DropsOut(Small):
    def features(self, observations):
        return nn.functional.dropout(super().features(observations), training=self.training)


@bad("twice")
class Twice(Small):
    def features(self, observations):
        x = super().features(observations)
        return self.again(self.again(x))

    def __init__(self, spec):
        super().__init__(spec)
        self.again = nn.Linear(8, 8)


@bad("values")
class Values(Small):
    """Cannot be built where tensors have no values."""

    def __init__(self, spec):
        super().__init__(spec)
        if self.output.weight.sum().item() > 1e9:
            raise ValueError


@bad("on_cpu")
class OnCpu(Small):
    def __init__(self, spec):
        super().__init__(spec)
        self.register_buffer("scale", torch.ones(1, device="cpu"))


@bad("many")
class Many(Small):
    def __init__(self, spec, *, blocks: int = 1):
        super().__init__(spec)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(nn.Identity())


@register("normed")
class Normed(Small):
    """With torch's own batch normalization."""

    def __init__(self, spec):
        super().__init__(spec)
        self.norm = nn.BatchNorm1d(8)

    def features(self, observations):
        return self.norm(super().features(observations))


@register("dueling")
class Dueling(Small):
    """Wang et al. 2016, equation 9."""

    output_layers = ("value", "advantage")

    def __init__(self, spec):
        super().__init__(spec)
        del self.output
        self.value = nn.Linear(8, 1)
        self.advantage = nn.Linear(8, spec.num_actions)

    def q_values(self, features):
        advantage = self.advantage(features.float())
        return self.value(features.float()) + advantage - advantage.mean(1, keepdim=True)


@register("silu")
class Silu(Small):
    def activation(self, x):
        return nn.functional.silu(x)
'''
