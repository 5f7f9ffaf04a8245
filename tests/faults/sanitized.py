"""The C code under AddressSanitizer and UBSan: ``python -m tests.faults.sanitized --cases 3000``.

It builds the native library with both in a temporary folder, then decodes, crops and augments in a
process that they watch: damaged JPEGs, rows that lie about them, boxes and sizes at their limits.
Every buffer has the size that the C code may count on, so a byte past it ends the process.
"""

import argparse
import ctypes
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastproj.core import native

ROOT = Path(__file__).parents[2]
NAME = "native_code"
FAULT = "fuzzed: the C code under AddressSanitizer and UBSan: damaged JPEGs, lying rows, odd sizes"
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-fopenmp-simd"]
OPTIONS = "detect_leaks=0:allocator_may_return_null=1"  # Python itself leaks at its end
Picture = tuple[bytes, int, int]  # a JPEG, its width and height
TABLE = 24  # bytes of a sample's entry in the table that follows the images


def build(folder: Path) -> Path:
    """The library with both sanitizers, compiled in ``folder``."""
    library = folder / "_native.so"
    parts = "loaders/fill.c", "augment/augment.c", "evaluation/probes/nearest.c"
    sources = [ROOT / "fastproj" / part for part in parts]
    subprocess.run(
        ["gcc", *FLAGS, "-shared", "-fPIC", *sources, "-ljpeg", "-lm", "-o", library], check=True
    )
    return library


def _pictures(rng: np.random.Generator) -> list[Picture]:
    found = []
    for how in (
        {"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0", "progressive": True}, {"restart_marker_rows": 1}, {"mode": "L"},
        {"mode": "CMYK"},
    ):  # fmt: skip
        how = dict(how)
        width, height = rng.integers(1, 70, 2).tolist()
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        buffer = io.BytesIO()
        image.convert(str(how.pop("mode", "RGB"))).save(buffer, "JPEG", **how)
        found.append((buffer.getvalue(), width, height))
    return found


def _damage(take: random.Random, stored: bytes) -> bytes:
    data = bytearray(stored)
    for _ in range(take.randint(0, 3)):
        at = take.randrange(len(data))
        if (change := take.randrange(4)) == 0:
            data[at] ^= take.randint(1, 255)
        elif change == 1:
            data[at : at + 2] = take.choice([b"\xff\xff", b"\0\0", b"\xff\xd8", b"\xff\xda"])
        elif change == 2:
            data[at:at] = take.randbytes(take.randint(1, 20))
        elif at:
            del data[at:]
    return bytes(data)


def _box(take: random.Random, height: int, width: int) -> list[int]:
    high, wide = take.randint(1, height), take.randint(1, width)
    return [take.randint(0, height - high), take.randint(0, width - wide), high, wide]


def _decode(library: ctypes.CDLL, take: random.Random, pictures: list[Picture]) -> None:
    """One batch of three samples: cropped, or whole into padded images."""
    samples: list[tuple[int, bytes, int, int]] = []  # mode, stored, width, height
    for _ in range(3):
        stored, width, height = take.choice(pictures)
        if take.randrange(4) == 0:
            width, height = take.choice([(1, 1), (3000, 1), (1, 3000), (7, 5), (33, 2)])
            samples.append((1, bytes(3 * width * height), width, height))
            continue
        if take.randrange(6) == 0:  # the row says another size
            width, height = take.randint(1, 400), take.randint(1, 400)
        samples.append((0, _damage(take, stored), width, height))
    parts = [np.frombuffer(stored, np.uint8) for _, stored, _, _ in samples]
    data = np.concatenate([*parts, np.zeros(TABLE * len(parts), np.uint8)])
    length = np.array([len(part) for part in parts])
    pointer = np.cumsum(length) - length
    mode = np.array([mode for mode, *_ in samples], np.uint8)
    width, height = (np.array([sample[i] for sample in samples]) for i in (2, 3))
    views, size = take.randint(1, 3), take.choice([1, 2, 3, 8, 31, 64, 225])
    positions = np.array(take.sample(range(3), 3))
    boxes = np.array([[_box(take, *samples[i][:1:-1]) for i in positions] for _ in range(views)])
    out = np.empty((views, 3, size, size, 3), np.uint8)
    rows, columns = int(height.max()), int(width.max())
    padded = np.empty((3, rows, columns, 3), np.uint8) if take.randrange(4) == 0 else None
    specs = (native.CropSpec * 1)(native.CropSpec(boxes.ctypes.data, out.ctypes.data, views, size))
    batch = native.Batch(
        *(a.ctypes.data for a in (data, positions, mode, width, height, pointer, length)),
        3, 1, specs, None if padded is None else padded.ctypes.data, rows, columns, 0,
    )  # fmt: skip
    why = ctypes.create_string_buffer(native.MESSAGE_BYTES)
    library.fastproj_prefetch(ctypes.byref(batch))
    failed = library.fastproj_fill(ctypes.byref(batch), why)
    assert -1 <= failed < 3 and (failed < 0 or why.value)


class _Augmented(ctypes.Structure):  # augment.c's Batch
    _fields_ = [
        ("crops", ctypes.c_void_p), ("out", ctypes.c_void_p), ("samples", ctypes.c_int64),
        ("height", ctypes.c_int64), ("width", ctypes.c_int64), ("reach", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "flip", "place", "brightness", "contrast", "saturation", "hue", "gray", "sigma",
            "solarize", "scale", "shift",
        )),
        ("next", ctypes.c_int64),
    ]  # fmt: skip


def _augment(library: ctypes.CDLL, take: random.Random) -> None:
    """Images of odd sizes, and factors at their limits or beyond."""
    height, width, samples = take.randint(1, 50), take.randint(1, 50), 2
    reach = take.randint(0, min(height, width) - 1)
    odd = [0, 1, 0.5, 1e-30, 1e30, float("inf"), float("nan"), -1]

    def factors() -> np.ndarray:
        return np.array([take.choice(odd) for _ in range(samples)], np.float32)

    def flags() -> np.ndarray:
        return np.array([take.randrange(2) for _ in range(samples)], np.uint8)

    arrays = [
        np.zeros((samples, height, width, 3), np.uint8) + take.randrange(256),
        np.empty((samples, height, width, 3), np.float32),
        flags(), np.array([take.sample(range(4), 4) for _ in range(samples)]),
        factors(), factors(), factors(), factors(), flags(), factors(), flags(),
        np.ones(3, np.float32), np.zeros(3, np.float32),
    ]  # fmt: skip
    at = [array.ctypes.data for array in arrays]
    batch = _Augmented(at[0], at[1], samples, height, width, reach, *at[2:], 0)
    assert library.fastproj_augment(ctypes.byref(batch)) == 0


class _Search(ctypes.Structure):  # nearest.c's
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rough", "exact", "query", "bank")),
        *((name, ctypes.c_int64) for name in ("queries", "rows", "width", "some", "k")),
        *((name, ctypes.c_void_p) for name in ("near", "row", "others")),
        ("next", ctypes.c_int64),
    ]  # fmt: skip


def _nearest(library: ctypes.CDLL, take: random.Random) -> None:
    """Similarities of any bits, NaN among them, and numbers of rows around those of a block."""
    queries, rows, width = 2, take.choice([1, 31, 32, 33, 70, 500]), take.randint(1, 40)
    some = take.randint(1, rows)
    k = take.randint(1, some)
    rng = np.random.default_rng(take.randrange(2**32))
    rough = rng.integers(0, 2 ** take.choice([2, 16]), (queries, rows), np.uint16)
    exact = rng.integers(0, 2 ** take.choice([2, 32]), (queries, rows), np.uint32)
    arrays = [
        rng.standard_normal((queries, width)).astype(np.float32),
        rng.standard_normal((rows, width)).astype(np.float32),
        np.empty((queries, k), np.float32), np.empty((queries, k), np.int64),
        np.empty(queries, np.float32),
    ]  # fmt: skip
    at = [array.ctypes.data for array in arrays]
    given = (rough.ctypes.data, None) if take.randrange(2) else (None, exact.ctypes.data)
    search = _Search(*given, *at[:2], queries, rows, width, some, k, *at[2:], 0)
    assert library.fastproj_nearest(ctypes.byref(search)) == 0
    assert all(len({*found}) == k and 0 <= min(found) <= max(found) < rows for found in arrays[3])


def watched(path: str, first: int, cases: int) -> None:
    """What runs under the sanitizers: a line on stdout after every case."""
    library = ctypes.CDLL(path)
    library.fastproj_fill.restype = ctypes.c_int64
    pictures = _pictures(np.random.default_rng(0))
    for seed in range(first, first + cases):
        take = random.Random(seed)
        part = take.randrange(8)
        if part < 6:
            _decode(library, take, pictures)
        else:
            (_augment if part == 6 else _nearest)(library, take)
        os.write(1, b".")


def fuzz(cases: int) -> dict[str, Any]:
    """One row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        asan = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.sanitized", "--cases", str(cases), "--library",
             library],
            cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": OPTIONS},
        )  # fmt: skip
    tried = min(len(done.stdout) + bool(done.returncode), cases)
    said = [line for line in done.stderr.splitlines() if "ERROR" in line or "runtime" in line]
    lost = "; ".join(said[:2]) or done.stderr[-300:] if done.returncode else ""
    return {
        "fault": FAULT,
        "tried": tried,
        "survived": len(done.stdout),
        "lost": {lost: 1} if lost else {},
        "command": f"python -m tests.faults.sanitized --cases {cases}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sanitized", description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--library", help="run the cases with this library, already watched")
    parser.add_argument("--out", type=Path, help="JSON; other results in it stay as they are")
    given = parser.parse_args()
    if given.library:
        watched(given.library, 0, given.cases)
        return
    result = fuzz(given.cases)
    print(json.dumps(result, indent=1))
    if given.out:
        results = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps({**results, NAME: result}, indent=1) + "\n")
    sys.exit(bool(result["lost"]))


if __name__ == "__main__":
    main()
