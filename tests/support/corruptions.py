"""A stand-in for the package ``imagecorruptions``, which an extra installs."""

from types import ModuleType
from typing import Any

import numpy as np


def stand_in() -> ModuleType:
    """Its "fog" adds ten times the severity; all others add noise."""

    def corrupt(image: np.ndarray, severity: int, corruption_name: str) -> np.ndarray:
        assert image.dtype == np.uint8 and min(image.shape[:2]) >= 32 and image.shape[2] == 3
        shift = 10 * severity if corruption_name == "fog" else np.random.randint(0, 50, image.shape)
        return np.uint8(np.minimum(image.astype(int) + shift, 255))

    package: Any = ModuleType("imagecorruptions")
    package.corrupt = corrupt
    return package
