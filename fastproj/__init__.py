"""fastproj: does this projection head learn a better encoder? Images to linear-probe accuracy."""

import os
import sys

# OpenMP's threads spin for milliseconds while they wait, which steals the loader's cores and, where
# another process wants one too, stalls every parallel loop: a training step then took over 10 s
# instead of 1.1 (4 cores, one of them busy). Asleep at once they must be woken for each loop, which
# took 60 us for 3, an eigendecomposition of 512 x 512 50 ms for 10 (2 cores of an EPYC). So they
# spin 1,000 times, some 10 us, and then sleep: 860 images/s of a small ResNet, asleep at once 821;
# with a core that is busy 330 and 338 (n 3 and 2). On 2 cores of an Intel Xeon with AMX
# it is the reverse: that decomposition took 48 ms, asleep at once 28 (medians of 12), a logistic
# path of 10 classes 4.9 and 4.5 s (medians of 6). Read as torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of GNU's OpenMP; others know passive alone

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036  # whoever calls a command with an old Python sees why
    raise SystemExit(
        "error: fastproj needs Python 3.11 or newer; ./setup.sh makes .venv with one, "
        "then: .venv/bin/python -m fastproj.doctor"
    )

try:
    import lazy_loader
except ModuleNotFoundError:  # the doctor runs without it, and names it
    __all__: list[str] = []
else:
    # The public names stand in __init__.pyi, where editors and type checkers look for them too.
    __getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
