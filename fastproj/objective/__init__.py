"""Objectives: from projected views to a scalar loss.

``losses`` holds the pure functions, ``methods`` those with parts of their own (a predictor, a
queue, prototypes), and ``OBJECTIVES`` says which of them a run can name. A new one is a function
``f(z1, z2, **settings)`` or a subclass of ``Objective``, and one line here.
"""

from collections.abc import Callable
from typing import Any

from fastproj.errors import SettingError
from fastproj.objective.losses import barlow_twins, normalise, nt_xent, vicreg
from fastproj.objective.methods import (
    Byol,
    MocoV2Plus,
    MocoV3,
    Objective,
    SimSiam,
    SupCon,
    Swav,
    build,
)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "barlow_twins",
    "build_objective",
    "normalise",
    "nt_xent",
]

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "simclr": nt_xent,
    "barlow": barlow_twins,
    "byol": Byol,
    "simsiam": SimSiam,
    "mocov2plus": MocoV2Plus,
    "mocov3": MocoV3,
    "vicreg": vicreg,
    "swav": Swav,
    "supcon": SupCon,
}


def build_objective(name: str, width: int, **settings: Any) -> Objective:
    """The objective ``name`` over projections (V, B, ``width``).

    It takes what it names of ``settings`` and ignores the rest. Raises ``SettingError`` for a name
    that is not in ``OBJECTIVES``.
    """
    if name not in OBJECTIVES:
        raise SettingError(f"objective.name: no {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return build(OBJECTIVES[name], width, settings)
