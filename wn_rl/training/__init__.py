"""The training loop and the runs around it."""

from wn_rl.training.interfaces import Agent as Agent
from wn_rl.training.interfaces import Backend as Backend
from wn_rl.training.interfaces import Statistics as Statistics
from wn_rl.training.loop import FinishedEpisode as FinishedEpisode
from wn_rl.training.loop import TrainingLoop as TrainingLoop
from wn_rl.training.schedule import TrainEvent as TrainEvent
from wn_rl.training.schedule import epsilon_at as epsilon_at
from wn_rl.training.schedule import scheduled_events as scheduled_events
from wn_rl.training.schedule import training_seeds as training_seeds
