"""Q-networks: what describes one, how it is built, and the registry where a user's own stands beside the project's."""

from wn_rl.networks import q_network as q_network  # puts the project's networks into the registry
from wn_rl.networks.base import Network as Network
from wn_rl.networks.build import build_q_network as build_q_network
from wn_rl.networks.build import output_deviations as output_deviations
from wn_rl.networks.build import try_out as try_out
from wn_rl.networks.q_network import FirstConvolution as FirstConvolution
from wn_rl.networks.q_network import QNetwork as QNetwork
from wn_rl.networks.registry import get as get
from wn_rl.networks.registry import is_known as is_known
from wn_rl.networks.registry import load as load
from wn_rl.networks.registry import names as names
from wn_rl.networks.registry import options as options
from wn_rl.networks.registry import reference as reference
from wn_rl.networks.registry import register as register
from wn_rl.networks.spec import MAX_ACTIONS as MAX_ACTIONS
from wn_rl.networks.spec import MAX_PARAMETERS as MAX_PARAMETERS
from wn_rl.networks.spec import NATURE as NATURE
from wn_rl.networks.spec import QNetworkSpec as QNetworkSpec
from wn_rl.networks.spec import WeightInit as WeightInit
from wn_rl.networks.spec import unknown_in_file as unknown_in_file
from wn_rl.networks.spec import unknown_network_in_file as unknown_network_in_file
