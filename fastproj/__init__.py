"""fastproj: does this projection head learn a better encoder? Images to linear-probe accuracy."""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036  # whoever calls a command with an old Python sees why
    raise SystemExit(
        "error: fastproj needs Python 3.11 or newer; ./setup.sh makes .venv with one, "
        "then: .venv/bin/python -m fastproj.doctor"
    )
