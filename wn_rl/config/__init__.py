"""The configuration of a training run: its keys, presets, files, and what follows from them.

Precedence: a flag beats a key of ``--config FILE.yaml``, which beats the preset. Importing this loads neither torch nor
ale-py.
"""

from wn_rl.config.files import coerce as coerce
from wn_rl.config.files import configure as configure
from wn_rl.config.files import from_mapping as from_mapping
from wn_rl.config.files import load as load
from wn_rl.config.files import preset_names as preset_names
from wn_rl.config.files import read_yaml as read_yaml
from wn_rl.config.files import recorded as recorded
from wn_rl.config.files import to_mapping as to_mapping
from wn_rl.config.files import to_yaml as to_yaml
from wn_rl.config.flags import AUTO as AUTO
from wn_rl.config.flags import Count as Count
from wn_rl.config.flags import EnvCount as EnvCount
from wn_rl.config.flags import Options as Options
from wn_rl.config.flags import is_auto as is_auto
from wn_rl.config.flags import parse_count as parse_count
from wn_rl.config.renamed import current as current
from wn_rl.config.renamed import current_flags as current_flags
from wn_rl.config.resolving import import_network as import_network
from wn_rl.config.resolving import import_parameterization as import_parameterization
from wn_rl.config.resolving import network_spec as network_spec
from wn_rl.config.resolving import resolve as resolve
from wn_rl.config.synonyms import flag_suggestion as flag_suggestion
from wn_rl.config.synonyms import suggestion as suggestion
from wn_rl.config.train_config import BackendName as BackendName
from wn_rl.config.train_config import TrainConfig as TrainConfig
from wn_rl.config.train_config import validate as validate
