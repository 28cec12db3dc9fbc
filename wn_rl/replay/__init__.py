"""Experience replay: each frame is stored once, stacks are rebuilt when sampled."""

from wn_rl.replay.uniform import LazyMinibatch as LazyMinibatch
from wn_rl.replay.uniform import Minibatch as Minibatch
from wn_rl.replay.uniform import Replay as Replay
from wn_rl.replay.uniform import ReplayStorage as ReplayStorage
