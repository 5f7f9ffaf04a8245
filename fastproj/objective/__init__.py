"""Objectives: from projected views to a scalar loss.

``losses`` holds pure functions, ``methods`` modules with parameters or state (a predictor, a queue,
prototypes), and ``OBJECTIVES`` their names. A new one is a function ``f(z1, z2, option=default)``
or a subclass of ``Objective``, and one line here.
"""

from typing import TYPE_CHECKING

import lazy_loader

from fastproj.core.table import Table

if TYPE_CHECKING:
    from fastproj.objective.losses import barlow_twins, normalize, nt_xent
    from fastproj.objective.methods import Objective, build_objective

__all__ = [
    "OBJECTIVES",
    "Objective",
    "barlow_twins",
    "build_objective",
    "normalize",
    "nt_xent",
]

OBJECTIVES = Table(
    "objective.name",
    {
        "simclr": "fastproj.objective.losses:nt_xent",
        "barlow": "fastproj.objective.losses:barlow_twins",
        "byol": "fastproj.objective.methods:Byol",
        "simsiam": "fastproj.objective.methods:SimSiam",
        "mocov2plus": "fastproj.objective.methods:MocoV2Plus",
        "mocov3": "fastproj.objective.methods:MocoV3",
        "vicreg": "fastproj.objective.losses:vicreg",
        "swav": "fastproj.objective.methods:Swav",
        "supcon": "fastproj.objective.methods:SupCon",
        "supervised": "fastproj.objective.methods:Supervised",
    },
)

# Imported when first read, as they import torch.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "losses": ["barlow_twins", "normalize", "nt_xent"],
        "methods": ["Objective", "build_objective"],
    },
)
