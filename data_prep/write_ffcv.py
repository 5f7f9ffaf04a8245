"""Command: raw images to betons; the same as ``fastproj prepare``, which see.

python data_prep/write_ffcv.py --data.dataset cifar10 --data.root DIR --data.out DIR
python data_prep/write_ffcv.py --verify DIR/train.beton
python data_prep/write_ffcv.py --adopt DIR/train.ffcv
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: Python then looks beside it, not in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastproj.core.errors import run_command
from fastproj.prepare.command import main

if __name__ == "__main__":
    run_command(main)
