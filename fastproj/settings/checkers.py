"""What a setting may hold: text in, a value out, ``ValueError`` where the text does not fit."""

import math
import os
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from fastargs.validation import Checker

from fastproj.core.table import Table, resolve

Value = str | int | float | bool | tuple[float, ...] | tuple[str, ...] | None
"""What a setting may hold: plain and immutable, so that JSON and checkpoints take it as it is."""

LARGEST, LARGEST_WHOLE = 1e30, 2**53


class _Scalar(Checker):
    """A checker of one piece of text; a list or null is refused. Refusals are ``ValueError``."""

    def check(self, value: str | list[str] | None) -> Value:
        if not isinstance(value, str):
            raise ValueError
        return self.parse(value)

    @abstractmethod
    def parse(self, text: str) -> Value: ...


@dataclass(frozen=True)
class Bool(_Scalar):
    """true, yes, 1 or false, no, 0; never truthiness, which makes the text ``False`` true."""

    def parse(self, text: str) -> bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]

    def help(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Float(_Scalar):
    """A number with low <= x <= high and x > above; ``1e-4`` needs no dot.

    Not beyond ``LARGEST``, whose products with others float32 holds, or int64 for a whole number.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def parse(self, text: str) -> float:
        return self._bounded(float(text))

    def help(self) -> str:
        return "a number" + self._range()

    def _bounded(self, value: Any) -> Any:
        largest = LARGEST if isinstance(value, float) else LARGEST_WHOLE
        if not (abs(value) <= largest and self.low <= value <= self.high and value > self.above):
            raise ValueError
        return value

    def _range(self) -> str:
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f" from {self.low:.10g} to {self.high:.10g}"
        bounds = [("at least", self.low), ("above", self.above), ("at most", self.high)]
        words = [f"{word} {bound:.10g}" for word, bound in bounds if math.isfinite(bound)]
        return " " + " and ".join(words) if words else ""


@dataclass(frozen=True)
class Int(Float):
    """A whole number within the same bounds; ``1e3`` and ``1_000`` are, 0.5 is not."""

    def parse(self, text: str) -> int:
        try:
            return self._bounded(int(text))
        except ValueError:
            number = self._bounded(float(text))
            if number != int(number):
                raise
            return self._bounded(int(number))

    def help(self) -> str:
        return "a whole number" + self._range()


def _texts(value: str | list[str] | None) -> list[str]:
    """The texts of a list, which the command line separates by commas; at least one."""
    if isinstance(value, str):
        value = re.sub(r"^\[(.*)\]$", r"\1", value.strip()).split(",")
    if not value:
        raise ValueError
    return value


@dataclass(frozen=True)
class Floats(Float):
    """A tuple of numbers; on the command line ``0.1,0.3``. One number is a list of one."""

    def check(self, value: str | list[str] | None) -> tuple[float, ...]:
        return tuple(self.parse(text) for text in _texts(value))

    def help(self) -> str:
        return "numbers" + self._range()


@dataclass(frozen=True)
class Ints(Floats, Int):
    """A tuple of whole numbers, written as ``Floats``."""

    def help(self) -> str:
        return "whole numbers" + self._range()


@dataclass(frozen=True)
class Schedule(Floats):
    """One number, for the whole run, or two: from the first to the second, linearly over it."""

    def check(self, value: str | list[str] | None) -> tuple[float, ...]:
        numbers = super().check(value)
        if len(numbers) > 2:
            raise ValueError
        return numbers

    def help(self) -> str:
        return "one number, or first,last" + self._range()


@dataclass(frozen=True)
class Text(_Scalar):
    """Printable and not empty, so that it can name a file and fits on one line."""

    def parse(self, text: str) -> str:
        if not text or not text.isprintable():
            raise ValueError
        return text

    def help(self) -> str:
        return "text"


@dataclass(frozen=True)
class Part(_Scalar):
    """``i/N``: one of N parts, counted from 0, of at most ``most``."""

    most: int

    def parse(self, text: str) -> str:
        number, of = map(int, text.split("/"))
        if not 0 <= number < of <= self.most:
            raise ValueError
        return f"{number}/{of}"

    def help(self) -> str:
        return f"i/N with 0 <= i < N <= {self.most}"


@dataclass(frozen=True)
class File(Text):
    """A path, as text; ``~`` is expanded, because a file has no shell to do it."""

    def parse(self, text: str) -> str:
        return os.path.expanduser(super().parse(text))

    def help(self) -> str:
        return "a path"


@dataclass(frozen=True)
class Texts(Text):
    """A tuple of texts; on the command line ``a,b``. One text is a list of one."""

    def check(self, value: str | list[str] | None) -> tuple[str, ...]:
        return tuple(os.path.expanduser(self.parse(text.strip())) for text in _texts(value))

    def help(self) -> str:
        return "names, as a,b"


class Choice(_Scalar):
    """One of a few lower-case words, in any case."""

    def __init__(self, *choices: str):
        self.choices = choices

    def parse(self, text: str) -> str:
        if text.lower() not in self.choices:
            raise ValueError
        return text.lower()

    def help(self) -> str:
        return " | ".join(self.choices)


class Key(Choice):
    """A name in a room's table, or one of ``others``; the room is imported when it is asked for.

    ``address``: ``"package.module:TABLE"``.
    """

    def __init__(self, address: str, *others: str):
        self.address, self.others = address, others

    @property
    def table(self) -> Table:
        return resolve(self.address)

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.others, *self.table)

    def parse(self, text: str) -> str:
        return text if text in self.choices else super().parse(text)


class KeyOrAddress(Key):
    """A name in a room's table, ``LIBRARY:NAME`` or ``package.module:function``."""

    def __init__(self, address: str, *libraries: str):
        super().__init__(address)
        self.libraries = libraries

    def parse(self, text: str) -> str:
        return text if re.fullmatch(r"[\w.]+:[\w./-]+", text) else super().parse(text)

    def help(self) -> str:
        addresses = [f"{library}:NAME" for library in self.libraries]
        return " | ".join([super().help(), *addresses, "package.module:function"])


class Keys(Key):
    """One or more different names in a room's table: a tuple of them; ``logistic,knn``."""

    def check(self, value: str | list[str] | None) -> tuple[str, ...]:
        names = tuple(str(self.parse(text.strip())) for text in _texts(value))
        if len(set(names)) < len(names):
            raise ValueError
        return names

    def help(self) -> str:
        return "one or more of " + super().help()


@dataclass(frozen=True)
class OrNull(Checker):
    """The inner checker's values, or null."""

    inner: Checker

    def check(self, value: str | list[str] | None) -> Value:
        unset = value is None or (isinstance(value, str) and value.lower() in ("null", "none"))
        return None if unset else self.inner.check(value)

    def help(self) -> str:
        return self.inner.help() + ", or null"
