"""What a user's own parameterization may override under its former name, for one version."""

from __future__ import annotations

import warnings


class FormerNameWarning(FutureWarning):
    """Something has another name now; the former one works for one version."""


FORMER_NAMES = {"check": "validate", "computes": "make_parametrization", "treats": "default_layers"}
"""Former name → name."""


def accept_former_names(kind: type, base: type) -> None:
    """Let a new class override something under its former name, or call it so on a class above it.

    A class that overrides something under its former name gets a :class:`FormerNameWarning`.

    Args:
        kind: the class, a subclass of ``base``.
        base: the class in which the names were changed.
    """
    for former, name in FORMER_NAMES.items():
        for above in kind.__mro__:
            if issubclass(above, base) and name in vars(above) and former not in vars(above):
                setattr(above, former, vars(above)[name])  # for super().check() in a class that was written before
        owner = next((above for above in kind.__mro__ if former in vars(above) or name in vars(above)), None)
        if owner is not None and name not in vars(owner):
            setattr(kind, name, vars(owner)[former])
            warnings.warn(
                f"{kind.__name__}.{former} is now called {name}; the former name still works in this version only",
                FormerNameWarning,
                stacklevel=3,
            )
