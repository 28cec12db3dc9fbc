"""A network of your own, a small residual one: ``python -m docs.examples.own_network`` trains it."""

from __future__ import annotations

from torch import Tensor, nn

import wn_rl
from wn_rl.networks import Network, QNetworkSpec, register


class Block(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return as many channels and pixels as ``x`` has."""
        return x + self.second(self.first(x.relu()).relu())


@register("residual")
class Residual(Network):
    """Three stages of convolution, pooling and one residual block, as in IMPALA (Espeholt et al. 2018, figure 3)."""

    def __init__(self, spec: QNetworkSpec, *, width: int = 1) -> None:
        super().__init__(spec)
        channels, height, depth = spec.observation_shape[0], spec.observation_shape[1], 16 * width
        stages: list[nn.Module] = []
        for outputs in (depth, 2 * depth, 2 * depth):
            stages += [nn.Conv2d(channels, outputs, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1), Block(outputs)]
            channels, height = outputs, (height + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Linear(channels * height * height, spec.hidden_units)
        self.output = nn.Linear(spec.hidden_units, spec.num_actions)

    def features(self, observations: Tensor) -> Tensor:
        """Return what the output layer sees, (B, hidden units), of uint8 observations, (B, 4, 84, 84)."""
        x = self.stages(self.pixels(observations)).relu()
        return self.hidden(x.flatten(1)).relu()


if __name__ == "__main__":
    wn_rl.train(network=Residual, game="Breakout", param="wn", preset="quick", frames=40_000)
