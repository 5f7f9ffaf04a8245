"""Progress of a long command: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts images towards ``total`` on stderr, with images/s and time left."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done = name, total, 0
        self.start = self.last = time.perf_counter()
        self.bar = tqdm(
            total=total, desc=name, unit=" images", leave=False, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, images: int) -> None:
        """Count ``images`` more as done."""
        self.done += images
        self.bar.update(images)
        now = time.perf_counter()
        if self.bar.disable and now - self.last >= EVERY:
            self.last = now
            rate = self.done / (now - self.start)
            print(
                f"{self.name}: {self.done:,}/{self.total:,} images, {rate:,.0f}/s, "
                f"{(self.total - self.done) / rate:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
