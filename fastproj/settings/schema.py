"""How settings are declared: frozen dataclasses whose fields carry fastargs' Params."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import yaml
from fastargs import Config, Param, Section
from fastargs.validation import Checker

from fastproj.core.errors import InputError
from fastproj.core.table import Table, hyperparameters
from fastproj.settings.checkers import Bool, Float, Floats, Int, Key, OrNull, Text, Value

Options = Mapping[str, Any]
"""The hyperparameters of a chosen entry: name -> value, each one that its signature names."""


class Given(NamedTuple):
    """A setting as a file or the command line gives it: text, its source, and its place."""

    name: str
    text: str | list[str] | None
    source: str
    where: str


@dataclass(frozen=True)
class Needs:
    """A setting is read only where ``holds`` is true of the values of the settings ``of``."""

    words: str  # "projector.latents is a number": ends a message
    of: tuple[str, ...]
    holds: Callable[..., bool]


class Declared(Param):
    """A setting: fastargs' Param, and where it is read.

    ``needs``: what must hold for anything to read it. ``also`` (of a hyperparameter): what reads
    it beside the entries that name it.
    """

    def __init__(
        self,
        checker: Checker,
        desc: str,
        default: Value = None,
        *,
        required: bool = False,
        needs: Needs | None = None,
        also: Needs | None = None,
    ) -> None:
        super().__init__(checker, desc, default, required)
        self.needs, self.also = needs, also


def setting(checker: Checker, desc: str, default: Value = None, **rest: Any) -> Any:
    """A field of a section; takes what ``Declared`` takes."""
    return field(default=default, metadata={"param": Declared(checker, desc, default, **rest)})


def options(choice: str, /, given: tuple[str, ...] = (), **declared: Declared) -> Any:
    """The field with the hyperparameters of the entry that the field ``choice`` names.

    ``declared``: help, unit and bounds of the built-in entries' ones, so that ``--help`` imports
    none. One that only a plugin's entry names needs no declaration: see ``undeclared``. ``given``:
    parameters that the command gives, which are no settings.

    Where ``choice`` names several entries, the option ``k`` of the entry ``knn`` is ``knn_k``.
    """
    metadata = {"choice": choice, "declared": declared, "given": given}
    return field(default_factory=dict, metadata=metadata)


@dataclass(frozen=True)
class Loaded:
    """What ``load`` returns: the sections, and every value that is read with where it is from."""

    plugins: tuple[str, ...]  # "/folder/file.py#sha256=…" or "module#sha256=…"
    _values: dict[str, Value]
    _sources: dict[str, str]
    _blocks: tuple[Given, ...]  # what stands in the schema's blocks, in its order

    def flat(self) -> dict[str, Value]:
        """``{"section.name": value}`` of all that is read, in the order of declaration.

        ``plugins``, where there are any: their names and hashes, without their folders.
        """
        loaded = tuple(plugin.rpartition("/")[2] for plugin in self.plugins)
        return self._values | ({"plugins": loaded} if loaded else {})

    def sources(self) -> dict[str, str]:
        """``{"section.name": "default" | "file PATH" | "command line"}`` of all that is read."""
        return dict(self._sources)

    def to_yaml(self) -> str:
        """The text of ``config.yaml``: each value, its source as a comment; ``--cfg`` reads it."""
        lines = [f"plugins: {as_yaml(self.plugins)}"] if self.plugins else []
        section = ""
        for key, value in self._values.items():
            before, (section, name) = section, key.split(".")
            if section != before:
                lines.append(f"{section}:")
            lines.append(f"  {name}: {as_yaml(value)}  # {self._sources[key]}")
        return "\n".join(lines) + "\n"


def as_yaml(value: Value) -> str:
    """One value as YAML 1.1 on one line (``3.0e-05``: without the dot others read it as text)."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.splitlines()[0]


def written(name: str, default: Value) -> Given:
    """A signature's default as ``config.yaml`` will have it, to be checked before anything runs."""
    text: str | list[str] | None = default if isinstance(default, str) else as_yaml(default)
    if isinstance(default, tuple):
        text = [one if isinstance(one, str) else as_yaml(one) for one in default]
    return Given(name, None if default is None else text, "default", "the default in a signature")


S = TypeVar("S", bound=Loaded)


class Schema(Config, Generic[S]):
    """The fastargs Config of a dataclass of sections: every Param under ``section.name``.

    ``readers``: the commands that read only a part, each with the sections and settings it reads.
    ``blocks``: keys below which a file names things of its own; whoever uses them checks them.
    """

    def __init__(
        self,
        kind: type[S],
        readers: Mapping[str, tuple[str, ...]] | None = None,
        blocks: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.kind, self.readers, self.blocks = kind, dict(readers or {}), blocks
        self.params: dict[str, Declared] = {}
        self.groups: dict[str, type] = {}
        self.choices: dict[str, str] = {}  # section -> the setting that names its entry
        self.given: dict[str, tuple[str, ...]] = {}  # section -> parameters that are no settings
        common = {item.name for item in fields(Loaded)}
        for group in fields(kind):
            if group.name not in common:
                assert isinstance(group.type, type) and group.type.__doc__
                self.groups[group.name] = group.type
                self._add(group.name, group.type)

    def _add(self, name: str, kind: type) -> None:
        declared: dict[str, Declared] = {}
        for item in fields(kind):
            if "choice" in item.metadata:
                self.choices[name] = f"{name}.{item.metadata['choice']}"
                self.given[name] = item.metadata["given"]
                declared |= item.metadata["declared"]
            else:
                declared[item.name] = item.metadata["param"]
        Section(name, kind.__doc__, self).params(**declared)
        self.params |= {f"{name}.{key}": param for key, param in declared.items()}

    def table(self, section: str) -> Table:
        """The table of the section's entries."""
        checker = self.params[self.choices[section]].checker
        assert isinstance(checker, Key)
        return checker.table

    def named(self, section: str, chosen: Value) -> dict[str, inspect.Parameter]:
        """The options that the chosen entry, or each of several, names: name -> parameter."""
        several = isinstance(chosen, tuple)
        return {
            f"{entry}_{name}" if several else name: parameter
            for entry in (chosen if isinstance(chosen, tuple) else [chosen])
            for name, parameter in hyperparameters(self.table(section)[str(entry)]).items()
            if name not in self.given[section]
        }

    def entries_with(self, section: str, short: str) -> list[str]:
        """The entries that name the option ``short``; imports every entry."""
        several = isinstance(self.params[self.choices[section]].default, tuple)
        return [
            entry
            for entry in self.table(section)
            if short in self.named(section, (entry,) if several else entry)
        ]

    def is_option(self, name: str) -> bool:
        """Whether ``section.name`` is a hyperparameter of an entry, declared or not."""
        section, _, short = name.partition(".")
        if not short or section not in self.choices:
            return False
        return short not in {item.name for item in fields(self.groups[section])}

    def in_block(self, name: str) -> bool:
        """Whether the name is a block's or begins with one's."""
        return name.partition(".")[0] in self.blocks

    def reads(self, command: str, name: str) -> bool:
        """Whether the command reads the setting ``section.name``."""
        parts = self.readers.get(command)
        return parts is None or any(name == part or name.startswith(f"{part}.") for part in parts)

    def build(self, values: Mapping[str, Value], options: Mapping[str, Options], **rest: Any) -> S:
        """The dataclass, of every setting's value and the options of each section's entry."""
        made = {}
        for name, kind in self.groups.items():
            made[name] = kind(
                **{
                    item.name: options[name] if "choice" in item.metadata
                    else values[f"{name}.{item.name}"]
                    for item in fields(kind)
                }
            )  # fmt: skip
        return self.kind(**made, **rest)


def undeclared(name: str, parameter: inspect.Parameter) -> Declared:
    """A hyperparameter that only a plugin's entry names: type and default from its signature.

    Raises ``InputError`` for a type that text cannot give.
    """
    kinds = get_args(parameter.annotation) or (parameter.annotation,)
    if not {bool, int, float, str, tuple} & set(kinds):
        kinds = (type(parameter.default),)
    if isinstance(parameter.default, tuple):
        kinds = (tuple,)
    checkers = {bool: Bool(), int: Int(), float: Float(), str: Text(), tuple: Floats()}
    for kind, checker in checkers.items():
        if kind in kinds:
            nullable = type(None) in kinds or parameter.default is None
            chosen = OrNull(checker) if nullable else checker
            return Declared(chosen, "", parameter.default)
    raise InputError(
        f"{name}: the signature says neither bool, int, float, str nor a tuple of numbers: give "
        "the parameter a default of one of them"
    )
