"""Every setting, declared once (``run.py``, ``commands.py``) and read strictly (``read.py``).

A section is a frozen dataclass; each field carries fastargs' ``Param``: checker, help with unit and
default. fastargs' own readers are not used: they ignore unknown keys, take ``False`` for true, cut
0.5 to 0 and exit 0 on an error. Here a file and the command line both arrive as text with a place,
and one checker a setting turns text into a value.

A hyperparameter of an objective, a projector or an optimizer belongs to the entry that names it:
``settings.objective.options`` holds those of the chosen one.
"""

from fastproj.settings.commands import (
    BENCH,
    DEMO,
    PREPARE,
    REPORT,
    BenchSettings,
    PrepareSettings,
    stored,
)
from fastproj.settings.embed import EMBED, EmbedSettings
from fastproj.settings.read import load
from fastproj.settings.run import RUN, Settings
from fastproj.settings.study import STUDY
from fastproj.settings.transfer import SEGMENT, TRANSFER, SegmentSettings, TransferSettings

__all__ = [
    "BENCH",
    "DEMO",
    "EMBED",
    "PREPARE",
    "REPORT",
    "RUN",
    "SEGMENT",
    "STUDY",
    "TRANSFER",
    "BenchSettings",
    "EmbedSettings",
    "PrepareSettings",
    "SegmentSettings",
    "Settings",
    "TransferSettings",
    "load",
    "stored",
]
