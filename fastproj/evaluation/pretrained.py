"""A pre-trained encoder on the disk: read from a checkpoint or an export, written as an export."""

import ast
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastproj.core.errors import InputError
from fastproj.core.files import replacing
from fastproj.models.architectures import is_address
from fastproj.models.encoders import build_encoder, num_features
from fastproj.models.finite import require_finite
from fastproj.models.projector import Projector, build_projector
from fastproj.runs import checkpoint

M = TypeVar("M", bound=nn.Module)
EXPORT = ".safetensors"  # how an export's name ends
ABOUT = ("encoder", "stem", "size", "mean", "std", "step", "epoch")  # its metadata
ONE_OF = {"stem", "size"}  # another library's encoder has no stem, an older export of ours no size


@dataclass(frozen=True)
class Pretrained:
    """Weights of an encoder and what they expect.

    ``encoder``, ``stem`` and ``size``: its architecture, as ``build_encoder`` names it. ``size`` is
    the side of the crops of its training, pixels; older exports of our encoders do not say it. An
    encoder of another library, which may be built for that size, has no ``stem``.
    ``mean`` and ``std``: per channel, of pixels in [0, 1]. ``step`` and ``epoch``: how long it was
    trained. ``file``: where all of this was read. ``settings`` and ``projector``: the run's, and
    the projector's weights; ``data``: the SHA-256 of the training samples. An export has none of
    these three.
    """

    encoder: str
    stem: str | None
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    epoch: int
    weights: Mapping[str, Tensor]
    file: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    projector: Mapping[str, Tensor] | None = None
    data: str | None = None

    @property
    def any_size(self) -> bool:
        """Whether its images may have any size: our encoders' may."""
        return not is_address(self.encoder)

    def build(self) -> nn.Module:
        """The encoder with these weights, on the CPU.

        Raises ``InputError`` where weights are missing, too many, of another shape or not finite.
        """
        return _filled(self.build_at_random(), self.weights, f"{self.file}: its encoder")

    def build_at_random(self) -> nn.Module:
        """The encoder with new random weights, on the CPU."""
        with _as_told(self.file):
            return build_encoder(self.encoder, self.stem or "cifar", self.size)  # one is read

    def build_projector(self) -> Projector | None:
        """The projector with its weights, on the CPU; None where the file has none."""
        if self.projector is None:
            return None
        told = {
            name.removeprefix("projector."): value
            for name, value in self.settings.items()
            if name.startswith("projector.")
        }
        width = num_features(self.build_at_random())
        with _as_told(self.file):
            projector = build_projector(told.pop("kind"), width, **told)
        return _filled(projector, self.projector, f"{self.file}: its projector")


@contextmanager
def _as_told(file: Path) -> Iterator[None]:
    """Turn whatever building what a foreign or altered file tells raises into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # missing entries, other types: a dozen exceptions
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file} tells of no encoder or projector that there is ({type(error).__name__}: "
            f"{reason}): give another checkpoint"
        ) from error


def _filled(module: M, weights: Mapping[str, Tensor], what: str) -> M:
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).rpartition(f"{type(module).__name__}: ")[2]
        raise InputError(
            f"{what} is not what its settings say ({reason[:200]}): give another checkpoint"
        ) from error
    require_finite(module.state_dict(), what)
    return module


def is_export(path: Path) -> bool:
    """Whether ``path`` is an export of ours; what cannot be read counts as a damaged one."""
    if path.suffix != EXPORT:
        return False
    try:
        with safe_open(path, "pt") as file:
            return bool({*ABOUT, "sha256"} & (file.metadata() or {}).keys())
    except (OSError, SafetensorError):
        return True


def is_checkpoint(state: Mapping[str, Any]) -> bool:
    """Whether ``state`` is what ``fastproj.train`` saves."""
    return {"encoder", "settings"} <= state.keys()


def load_pretrained(path: str | Path) -> Pretrained:
    """The encoder of a checkpoint, or of a file that ``save_pretrained`` wrote (``.safetensors``).

    Raises ``InputError`` for a file that is missing, damaged or holds no encoder.
    """
    path = Path(path)
    if path.suffix == EXPORT:
        return _load_export(path)
    state = checkpoint.load(path)
    if not is_checkpoint(state):
        raise InputError(f"{path} holds no encoder: give a checkpoint of fastproj.train")
    return of_checkpoint(state, path)


def of_checkpoint(state: Mapping[str, Any], path: Path) -> Pretrained:
    """The encoder and the projector of what ``fastproj.train`` saves, read from ``path``.

    Raises ``InputError`` where a part of it is missing.
    """
    try:
        made = state["settings"]
        for name in ("mean", "std"):
            if len(state[name]) != 3 or not all(map(math.isfinite, state[name])):
                raise KeyError(name)
        for place, name in ((state, "step"), (state, "epoch"), (made, "views.size")):
            if type(place[name]) is not int:
                raise KeyError(name)
        return Pretrained(
            encoder=made["model.encoder"],
            stem=made.get("model.stem"),
            size=made["views.size"],
            weights=state["encoder"],
            file=path,
            settings=made,
            projector=state["projector"],
            **{name: state[name] for name in ("mean", "std", "step", "epoch", "data")},
        )
    except Exception as error:  # settings may be anything, a tensor too
        raise InputError(
            f"{path} is no whole checkpoint of fastproj.train, it lacks {error}: give another one"
        ) from None


def save_pretrained(pretrained: Pretrained, path: Path) -> None:
    """Write an export: the weights under their library's names, all else as metadata.

    The metadata has a SHA-256 of it all as well: safetensors itself has no checksum. Raises
    ``InputError`` where the file cannot be written, and as ``Pretrained.build`` does.
    """
    pretrained.build()  # what is missing or not finite is not exported
    weights = {name: tensor.contiguous() for name, tensor in pretrained.weights.items()}
    given = {name: getattr(pretrained, name) for name in ABOUT}
    about = {name: str(value) for name, value in given.items() if value is not None}
    with replacing(path) as file:
        file.write(save(weights, metadata=about | {"sha256": _digest(about, weights)}))


def _load_export(path: Path) -> Pretrained:
    if not path.is_file():
        raise InputError(f"there is no export {path}: write it with fastproj.export")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is a damaged export ({error}): export the run again") from None
    missing = {*ABOUT, "sha256"} - about.keys() - (ONE_OF if about.keys() & ONE_OF else set())
    if missing:
        raise InputError(
            f"{path} is no export of fastproj, its metadata lacks {', '.join(sorted(missing))}: "
            "give one that fastproj.export wrote, or a checkpoint"
        )
    if about["sha256"] != _digest(about, weights):
        raise InputError(
            f"{path} is a damaged export (its checksum is another one): export the run again"
        )
    return Pretrained(
        encoder=about["encoder"],
        stem=about.get("stem"),
        size=ast.literal_eval(about.get("size", "None")),
        weights=weights,
        file=path,
        **{name: ast.literal_eval(about[name]) for name in ("mean", "std", "step", "epoch")},
    )


def _digest(about: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata ``ABOUT`` and each tensor's name and bytes, by name."""
    known = [about[name] for name in ABOUT if name in about]
    digest = hashlib.sha256(repr(known).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
