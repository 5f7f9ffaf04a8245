"""Where a run's scalars and pictures go beside ``metrics.jsonl``: TensorBoard, Weights & Biases.

A scalar is called ``EVENT/name`` with the event and the name that it has in ``metrics.jsonl``:
``step/loss``, ``epoch/diagnostics.rankme_features``, ``probe/online_top1``.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.core.files import write_text, writing
from fastproj.core.progress import write_line
from fastproj.runs import SINKS
from fastproj.runs.folder import RunFolder

LEFT_OUT = {"protocol", "step"}  # of an event: how it was measured, and the axis


class Sink(Protocol):
    """One sink of one run. It opens in the main process, after ``check``, for steps above ``step``.

    ``settings``: the run's, ``section.name`` -> value.
    """

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], step: int) -> None: ...

    @staticmethod
    def check() -> None:
        """Raise ``InputError``, or ``ModuleNotFoundError``, for what is missing on this machine."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, after ``step`` optimizer steps."""

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """A picture (3, h, w), uint8, on the CPU."""

    def close(self, failed: bool) -> None:
        """Write what is left; ``failed``: an error ended the run."""


class Sinks:
    """The sinks of a run as one. None of them can end it: one that fails is left out from then on.

    False if there are none.
    """

    def __init__(self, opened: Mapping[str, Sink]) -> None:
        self._opened = dict(opened)

    def __bool__(self) -> bool:
        return bool(self._opened)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """The numbers of an event of the journal."""
        measured = {name: value for name, value in fields.items() if name not in LEFT_OUT}
        values = {f"{kind}/{name}": value for name, value in _scalars(measured)}
        if values and "step" in fields:
            self._each(lambda sink: sink.scalars(values, fields["step"]))

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """A picture (3, h, w), uint8."""
        self._each(lambda sink: sink.picture(name, image.cpu(), step))

    def close(self, failed: bool) -> None:
        """Close every sink; a second call does nothing."""
        self._each(lambda sink: sink.close(failed))
        self._opened.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._opened.items()):
            try:
                call(sink)
            except Exception as error:  # a library's own: whatever it is, training goes on
                del self._opened[name]
                reason = str(error).strip().partition("\n")[0]
                write_line(
                    f"note: {name} failed ({type(error).__name__}: {reason}) and gets nothing more "
                    "of this run, which goes on; metrics.jsonl has it all"
                )


def check_sinks(names: Sequence[str]) -> None:
    """Raise ``InputError`` or ``ModuleNotFoundError`` where a sink could not be opened here."""
    for name in names:
        SINKS[name].check()


def open_sinks(
    names: Sequence[str], run: RunFolder, settings: Mapping[str, Any], step: int
) -> Sinks:
    """Open the entries ``names`` of ``SINKS``. ``step``: where the run starts or goes on.

    Raises ``InputError`` for one that cannot be opened.
    """
    return Sinks({name: SINKS[name](run, settings, step) for name in names})


def _scalars(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number in nested dicts, with its dotted name; lists are no scalars."""
    for name, value in fields.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", number) for inner, number in _scalars(value))


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder.

    On resume, steps that are done again replace what was logged of them.
    """

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with writing(run.tensorboard):
            self._writer = SummaryWriter(run.tensorboard, purge_step=step + 1 if step else None)
        if not step:
            text = "".join(f"    {name}: {value}\n" for name, value in settings.items())
            self._writer.add_text("settings", text, 0)

    @staticmethod
    def check() -> None:
        import torch.utils.tensorboard  # noqa: F401

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill loses nothing, and a watcher sees it at once

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self._writer.add_image(name, image, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, its files in ``wandb/`` of the run folder.

    Project, entity, server and mode are W&B's own variables: ``WANDB_PROJECT`` (default
    ``fastproj``), ``WANDB_ENTITY``, ``WANDB_BASE_URL``, ``WANDB_MODE=offline``. A resumed run goes
    on under the same id; W&B keeps the first values of steps that are done again. What was logged
    offline is sent by ``wandb sync``, of a resumed run by ``wandb sync --append``.
    """

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], step: int) -> None:
        import wandb

        with writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        if not run.wandb_id.exists():
            write_text(run.wandb_id, secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastproj"),
                name=run.name,
                id=run.wandb_id.read_text().strip(),
                resume="allow",
                dir=run.path,
                config=dict(settings),
                settings=wandb.Settings(console="off"),  # it would take the bar for lines
            )
        except wandb.Error as error:
            raise InputError(
                f"train.log_to wandb: {' '.join(str(error).split())}; WANDB_MODE=offline keeps the "
                "run on this disk"
            ) from error

    @staticmethod
    def check() -> None:
        import wandb

        online = wandb.setup().settings.mode in ("online", "shared")
        if online and not wandb.login(prompt=False, verify=False):
            raise InputError(
                "train.log_to wandb: Weights & Biases has no API key here: run wandb login, set "
                "WANDB_API_KEY, or keep the run on this disk with WANDB_MODE=offline"
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        import wandb

        self._log({name: wandb.Image(image.movedim(0, -1).numpy())}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._run.step:  # W&B takes no step twice, and warns of each
            self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
