"""Tables: what a run can choose by name, one table per vocabulary.

An entry that is text, ``"package.module:attribute"``, is imported when it is first read, so that
listing a table's names imports neither torch nor anything else that is slow.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from fastproj.core.errors import SettingError


class UnknownEntryError(SettingError, KeyError):
    """A name that a table does not have."""

    __str__ = Exception.__str__  # KeyError's would put quotes around the message


class Table(MutableMapping[str, Any]):
    """Names and their entries. ``TABLE["name"] = entry`` registers one, a later one replaces it.

    ``choice`` is the setting that names an entry (``objective.name``); messages begin with it.
    Reading an unknown name raises ``UnknownEntryError``, a ``SettingError`` and a ``KeyError``.
    """

    def __init__(self, choice: str, entries: Mapping[str, Any]) -> None:
        self.choice = choice
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise UnknownEntryError(
                f"{self.choice}: no {name!r}; choose one of {', '.join(self)} (did you mean "
                f"{nearest(name, self)!r}?)"
            )
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = resolve(entry)
        return entry

    def __setitem__(self, name: str, entry: Any) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def resolve(address: str) -> Any:
    """The object at ``"package.module:attribute"``, imported now."""
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)


def hyperparameters(entry: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a run can set of an entry: the parameters of its signature that have a default."""
    try:
        parameters = inspect.signature(entry, eval_str=True).parameters
    except NameError:  # annotations of names that exist for a type checker alone
        parameters = inspect.signature(entry).parameters
    return {name: p for name, p in parameters.items() if p.default is not p.empty}


def nearest(name: str, names: Iterable[str]) -> str:
    """The likest name; the part after a dot counts twice, as sections are easily mistaken."""

    def likeness(other: str) -> float:
        short = difflib.SequenceMatcher(None, name.split(".")[-1], other.split(".")[-1]).ratio()
        return short + difflib.SequenceMatcher(None, name, other).ratio()

    return max(names, key=likeness, default="")
