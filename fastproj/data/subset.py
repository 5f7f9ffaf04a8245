"""Some samples of a beton as a beton: for probes on a fraction of the labels, and measurements."""

import base64
import dataclasses

import numpy as np

from fastproj.data.beton import Beton
from fastproj.data.manifest import pack_names


def subset(beton: Beton, positions: np.ndarray) -> Beton:
    """The samples at ``positions`` (int64, (n,)), in this order; one may come several times.

    They are numbered anew (``index`` 0 … n-1), so a loader draws other crops for them than in the
    whole set, and other ones for each repetition. The file is shared; the manifest's mean, standard
    deviation and digest stay those of the whole file.
    """
    hashes, names = beton.manifest.sample_hashes()[positions], beton.manifest.source_names()
    sizes = ("width", "height", "source_width", "source_height")
    columns = ("mode", "pointer", "length", "label", *sizes)
    return dataclasses.replace(
        beton,
        manifest=dataclasses.replace(
            beton.manifest,
            samples=len(positions),
            hashes=base64.b64encode(hashes.tobytes()).decode(),
            sources=pack_names([names[position] for position in positions]),
        ),
        index=np.arange(len(positions)),
        **{name: getattr(beton, name)[positions] for name in columns},
    )
