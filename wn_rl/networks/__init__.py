"""Q-networks: what describes one, and how it is built."""

from wn_rl.networks.q_network import FirstConvolution as FirstConvolution
from wn_rl.networks.q_network import QNetwork as QNetwork
from wn_rl.networks.q_network import build_q_network as build_q_network
from wn_rl.networks.spec import MAX_ACTIONS as MAX_ACTIONS
from wn_rl.networks.spec import MAX_PARAMETERS as MAX_PARAMETERS
from wn_rl.networks.spec import QNetworkSpec as QNetworkSpec
from wn_rl.networks.spec import WeightInit as WeightInit
from wn_rl.networks.spec import layer_names as layer_names
from wn_rl.networks.spec import treated_names as treated_names
from wn_rl.networks.spec import unknown_in_file as unknown_in_file
