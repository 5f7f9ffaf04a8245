"""Weights in checkpoints of other libraries: which of them are a module's, and under what names.

Nothing says how a library lays out its checkpoint. We therefore look through every group of tensors
in the file (``state_dict``, ``model``, ``teacher``, …) for the prefix (``backbone.``,
``module.encoder_q.``, …) under which most of the module's own names and shapes are found.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.runs import checkpoint

SAFETENSORS = ".safetensors"
State = Mapping[str, Tensor]
# Of two copies of an encoder that match alike, the one trained by gradients is evaluated, and of a
# student and a teacher the teacher: as MoCo's, solo-learn's and DINO's own evaluations do.
SECOND_CHOICE = ("momentum", "encoder_k", "target", "student")
FIRST_CHOICE = "target_encoder"  # I-JEPA's and MSN's key of the teacher, which they evaluate
# The place of each child in ``nn.Sequential(*resnet.children())``, as lightly's examples build it,
# for torchvision's ResNet and for lightly's own, which has neither relu nor maxpool as children.
TORCHVISION_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
LIGHTLY_CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


CONV = "conv1.weight"  # the first of a ResNet's names


def _numbered(children: tuple[str, ...]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        number, dot, rest = name.partition(".")
        known = number.isdecimal() and int(number) < len(children)
        return f"{children[int(number)]}{dot}{_block(rest)}" if known else name

    return rename


def _block(name: str) -> str:
    """lightly's ResNet calls ``shortcut`` what torchvision calls ``downsample``."""
    return name.replace(".shortcut.", ".downsample.")


# Layout -> torchvision's name for one of its names, and the name of conv1's weight in it.
LAYOUTS: dict[str, tuple[Callable[[str], str], str]] = {
    "by name": (_block, ""),
    "torchvision's children by number": (_numbered(TORCHVISION_CHILDREN), "0.weight"),
    "lightly's children by number": (_numbered(LIGHTLY_CHILDREN), "0.weight"),
}


@dataclass(frozen=True)
class Group:
    """Tensors of a checkpoint under one prefix, renamed to torchvision's names.

    ``key``: where they lie in the file, ``state_dict`` for example; empty for the file itself.
    ``others``: names of the file's other tensors beside them.
    """

    key: str
    prefix: str
    layout: str
    lightly: bool
    tensors: State
    others: tuple[str, ...]

    def __str__(self) -> str:
        where = ", ".join(
            [f"key {self.key!r}"] * bool(self.key) + [f"prefix {self.prefix!r}"] * bool(self.prefix)
        )
        return where or "its top level"


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a ``.safetensors`` file or of one that ``torch.save`` wrote; no code is run.

    Raises ``InputError`` for a file that is missing, damaged, or holds more than tensors, numbers
    and text.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: give the file that pre-training wrote")
    try:
        if path.suffix == SAFETENSORS:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = checkpoint.read(path)
    except checkpoint.CodeError as error:
        raise InputError(
            f"{path} is not read, {error}: if you trust it, save its weights alone, in Python with "
            "the library that wrote it: torch.save(torch.load(FILE, weights_only=False)"
            "['state_dict'], NEW)"
        ) from None
    except (SafetensorError, checkpoint.DamagedError) as error:
        raise InputError(
            f"{path} is damaged or no checkpoint ({error}): copy it again, or save its weights "
            "alone: torch.save(model.state_dict(), FILE)"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__} and no weights by name")
    return state


def find_weights(
    path: Path, state: Mapping[str, Any], wanted: State, setting: str = "eval.encoder"
) -> Group:
    """The tensors in ``state``, of the file ``path``, that have the names and shapes ``wanted``.

    Batch norm's ``num_batches_tracked`` may be missing: evaluating does not need it. Raises
    ``InputError`` where others are missing, have another shape, or are too many; it names
    ``setting``, which gives the architecture.
    """
    anchor = next(iter(wanted))
    best = max(groups(state, anchor), key=lambda group: _score(group, wanted), default=None)
    if best is None:
        raise InputError(
            f"{path}: 0 of {len(wanted)} weights match, none is called {anchor}: give the "
            f"architecture that it was saved from; its first names are {_first(_names(state))}"
        )
    unfit = {name: _difference(best, name, wanted[name]) for name in wanted}
    unfit = {name: why for name, why in unfit.items() if why}
    # A deeper network holds all names of a shallower one, and more in the same children.
    children = {name.partition(".")[0] for name in wanted}
    more = {name for name in best.tensors if name.partition(".")[0] in children} - wanted.keys()
    unfit_and_more = unfit | dict.fromkeys(sorted(more), "is not in the encoder")
    if unfit_and_more:
        name, why = next(iter(unfit_and_more.items()))
        raise InputError(
            f"{path}: only {_score(best, wanted)[0]} of {len(wanted)} weights match ({best}) and "
            f"{len(more)} are too many: {name} {why}: give the architecture that it was saved from "
            f"as --{setting}"
        )
    return best


def groups(state: Mapping[str, Any], anchor: str = CONV) -> Iterator[Group]:
    """Every group of tensors that has a name ending in ``anchor``, in every layout of a ResNet."""
    for key, tensors in _tensors("", state):
        for layout, (rename, first) in LAYOUTS.items():
            if first and anchor != CONV:
                continue
            end = first or anchor
            ends = [name for name in tensors if name == end or name.endswith(f".{end}")]
            for prefix in dict.fromkeys(name.removesuffix(end) for name in ends):
                own = {
                    n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
                }
                yield Group(
                    key,
                    prefix,
                    layout,
                    any(".shortcut." in name for name in own),
                    {rename(name): tensor for name, tensor in own.items()},
                    tuple(name for name in tensors if not name.startswith(prefix)),
                )


def describe(group: Group, wanted: State) -> str:
    """One line: how many weights were found and where, and what in the file was not used."""
    unused = [name for name in group.tensors if name not in wanted] + list(group.others)
    rest = f"{len(unused)} not used: {_first(unused)}" if unused else "nothing else in it"
    found = sum(name in group.tensors for name in wanted)
    layout = "" if group.layout == "by name" else f", {group.layout}"
    return f"{found} of {len(wanted)} weights match ({group}{layout}); {rest}"


def _tensors(key: str, state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict by name in ``state`` that holds tensors, with its path of keys."""
    own = {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, Tensor)}
    if own:
        yield key, own
    for name, inner in state.items():
        if isinstance(inner, dict):
            yield from _tensors(f"{key}.{name}" if key else str(name), inner)


def _names(state: Mapping[str, Any]) -> list[str]:
    return [name for _, tensors in _tensors("", state) for name in tensors]


def _score(group: Group, wanted: State) -> tuple[int, int, int]:
    tensors = group.tensors
    fits = sum(n in tensors and tensors[n].shape == t.shape for n, t in wanted.items())
    second = sum(word in f"{group.key}.{group.prefix}" for word in SECOND_CHOICE)
    if group.key == FIRST_CHOICE:
        second = -1
    return fits, -second, -len(group.prefix)


def _difference(group: Group, name: str, wanted: Tensor) -> str:
    if name not in group.tensors:
        return "" if name.endswith("num_batches_tracked") else "is not there"
    found = group.tensors[name]
    if found.shape == wanted.shape:
        return ""
    return f"is {tuple(found.shape)} there and {tuple(wanted.shape)} in the encoder"


def _first(names: list[str], most: int = 3) -> str:
    more = ", …" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def as_state(group: Group, wanted: State) -> dict[str, Tensor]:
    """The group's tensors under the names ``wanted``, in their types, for ``load_state_dict``."""
    return {
        name: group.tensors[name].to(tensor.dtype) if name in group.tensors
        else torch.zeros_like(tensor)
        for name, tensor in wanted.items()
    }  # fmt: skip
