"""Where the parts of the project are: beside this package in a checkout, inside it in an installation.

``pip install`` puts the checkout's ``agents`` and ``configs`` into this package, as ``wn_rl.agents`` and
``wn_rl.configs``, since a top-level package called ``agents`` could hide another one of this name, or be hidden by it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from wn_rl.errors import WnRlError

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = None if (PACKAGE / "configs").is_dir() else PACKAGE.parent
"""The repository's root, also of an editable installation; None where the package is installed."""
PRESETS_DIR = (CHECKOUT or PACKAGE) / "configs"
_STARTED_AS = re.compile(r"(wn-rl|python -m wn_rl) \w+")


def import_agent(name: str) -> ModuleType:
    """Import a module of ``agents`` and return it.

    This package does not import agents by itself: the command chooses one at run time.

    Args:
        name: inside ``agents``, e.g. ``dqn``.

    Raises:
        WnRlError: another package called ``agents`` hides the checkout's.
    """
    return importlib.import_module(f"{_agents()}.{name}")


def _agents() -> str:
    """Return the name under which ``agents`` is imported."""
    if CHECKOUT is None:
        return "wn_rl.agents"
    try:
        found = importlib.util.find_spec("agents")
    except ValueError:  # a module without a spec
        found = None
    origin = None if found is None else found.origin
    if origin is not None and Path(origin).resolve().parent == CHECKOUT / "agents":
        return "agents"
    if importlib.util.find_spec("wn_rl.agents") is not None:  # an editable installation
        return "wn_rl.agents"
    raise WnRlError(
        f"another module called 'agents' ({origin or 'without a file'}) is found before {CHECKOUT / 'agents'}: "
        f"install this project with pip install -e {CHECKOUT}, or start from another directory"
    )


def command(name: str) -> str:
    """Return how a user types the command ``train`` or ``evaluate``, in the way that this program was started."""
    if started := _STARTED_AS.fullmatch(sys.argv[0]):
        return f"{started[1]} {name}"
    return f"wn-rl {name}" if CHECKOUT is None else f"python {name}.py"
