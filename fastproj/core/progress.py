"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from contextlib import suppress
from typing import Self

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines
# At 80 columns a long run leaves the bar itself 8: percentage, count and time left take 42, loss
# and images/s 28 more.
BAR = "{desc}{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}  {remaining} left{postfix}"


class Progress:
    """Counts towards ``total`` on stderr: percentage, count, time left and the rate.

    ``name`` stands before it; ``unit`` is what is counted, in the rate; ``start``: what was done
    before. ``lines`` false: no plain lines where there is no terminal; ``keep``: the bar stays when
    all is done. A context manager.
    """

    def __init__(
        self,
        total: int,
        name: str = "",
        unit: str = "images",
        start: int = 0,
        *,
        lines: bool = True,
        keep: bool = False,
    ) -> None:
        self.name, self.unit, self.total, self.done = name, unit, total, start
        self._start, self._lines, self._says = start, lines, ""
        self._began = self._last = time.perf_counter()
        self.on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=start, desc=f"{name}  " if name else "", bar_format=BAR,
            dynamic_ncols=True, miniters=1, leave=keep, disable=not self.on_terminal,
            file=sys.stderr,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count ``count`` more as done."""
        self.done += count
        now = time.perf_counter()
        rate = (self.done - self._start) / max(now - self._began, 1e-9)
        digits = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        self._bar.set_postfix_str(self._says or f"{digits} {self.unit}/s", refresh=False)
        self._bar.update(count)
        if self._lines and not self.on_terminal and now - self._last >= EVERY and rate:
            self._last = now
            print(
                f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, "
                f"{(self.total - self.done) / rate:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """Show ``text`` in place of the rate, from the next ``update`` on."""
        self._says = text


def write_line(line: str) -> None:
    """Print a line on stderr, above the bar if one is shown; where it cannot be, go on."""
    with suppress(OSError):
        if sys.stderr.isatty():
            tqdm.write(line, file=sys.stderr)
        else:  # tqdm's lock is shared with forked processes, and a kill never gives it back
            print(line, file=sys.stderr, flush=True)
