"""Experience replay: each frame is stored once, stacks are rebuilt when sampled."""

from wn_rl.replay.uniform import DrawnMinibatch as DrawnMinibatch
from wn_rl.replay.uniform import Entries as Entries
from wn_rl.replay.uniform import Minibatch as Minibatch
from wn_rl.replay.uniform import Replay as Replay
