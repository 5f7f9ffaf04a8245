"""From what was given to what is read: the chosen entries say which settings act at all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastproj.core.errors import SettingError
from fastproj.core.table import nearest
from fastproj.settings.checkers import Choice, Keys, OrNull, Value
from fastproj.settings.schema import Declared, Given, Needs, Schema, undeclared, written


@dataclass(frozen=True)
class Chosen:
    """Every setting's value, the options of each section's entry, the sources of what is read."""

    all: dict[str, Value]
    options: dict[str, dict[str, Any]]
    sources: dict[str, str]


def choose(schema: Schema, given: Sequence[Given]) -> Chosen:
    """Check what was given, in order, and leave out what nothing reads.

    A setting that nothing reads is refused where it was given together with the choice that makes
    it unread, or after it (files in their order, then the command line); what an earlier file gave
    for another choice is left out. Raises ``SettingError``.
    """
    later = dict.fromkeys(item.source for item in reversed(given))  # the last given comes first
    layers = {source: -n for n, source in enumerate(later)}
    last = {item.name: item for item in given}
    values: dict[str, Value] = {name: param.default for name, param in schema.params.items()}
    for item in given:
        if item.name in schema.params:
            values[item.name] = check(schema.params[item.name], item)

    named: dict[str, dict[str, Declared]] = {}  # section -> what its chosen entry names
    for section, choice in schema.choices.items():
        named[section] = {}
        for short, parameter in schema.named(section, values[choice]).items():
            name = f"{section}.{short}"
            own = schema.params.get(name) or undeclared(name, parameter)
            named[section][short] = own
            if name not in last:
                values[name] = parameter.default
                check(own, written(name, parameter.default))
            elif name not in schema.params:
                values[name] = check(own, last[name])

    def layer(name: str) -> float:
        return layers[last[name].source] if name in last else -math.inf

    def holds(needs: Needs) -> bool:
        return bool(needs.holds(*(values[name] for name in needs.of)))

    def silencers(name: str) -> tuple[str, ...]:
        """The settings whose values make ``name`` unread; none where it is read."""
        section, _, short = name.partition(".")
        param = schema.params.get(name)
        if schema.is_option(name) and short not in named[section]:
            also = param.also if param else None
            if also is None:
                return (schema.choices[section],)
            return () if holds(also) else (schema.choices[section], *also.of)
        return param.needs.of if param and param.needs and not holds(param.needs) else ()

    unread: set[str] = set()
    for name in dict.fromkeys([*schema.params, *last]):
        if choices := silencers(name):
            if name in last and layer(name) >= max(map(layer, choices)):
                why = _why(schema, values, name)
                raise SettingError(f"{last[name].where}: {name} is read {why}; leave it out")
            unread.add(name)

    values |= {name: param.default for name, param in schema.params.items() if name in unread}
    options: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for section in schema.groups:
        names = [name for name in schema.params if name.startswith(f"{section}.")]
        names += [f"{section}.{short}" for short in named.get(section, ())]
        names = [name for name in dict.fromkeys(names) if name not in unread]
        sources |= {name: last[name].source if name in last else "default" for name in names}
        options[section] = {
            name.partition(".")[2]: values[name] for name in names if schema.is_option(name)
        }
    return Chosen(values, options, sources)


def _why(schema: Schema, values: Mapping[str, Value], name: str) -> str:
    """Who would read ``name``, which nothing reads: the end of "it is read …"."""
    section, _, short = name.partition(".")
    param = schema.params.get(name)
    if param and param.needs and not param.needs.holds(*(values[n] for n in param.needs.of)):
        return f"only where {param.needs.words}"
    readers = " and ".join(schema.entries_with(section, short))
    also = f", and where {param.also.words}" if param and param.also else ""
    chosen = values[schema.choices[section]]
    names = " or ".join(map(str, chosen)) if isinstance(chosen, tuple) else chosen
    return f"by {readers}{also}, not by {names}"


def check(param: Declared, given: Given) -> Value:
    """The value that a text stands for; ``SettingError`` with what is wanted, and where."""
    try:
        return param.checker.check(given.text)
    except ValueError:
        shown = "null" if given.text is None else repr(given.text)
        checker = param.checker.inner if isinstance(param.checker, OrNull) else param.checker
        hint = ""
        if isinstance(checker, Choice) and isinstance(given.text, str):
            wrong = given.text
            if isinstance(checker, Keys):
                wrong = next((t for t in wrong.split(",") if t not in checker.choices), wrong)
            hint = f"; did you mean {nearest(wrong, checker.choices)!r}?"
        raise SettingError(
            f"{given.where}: {given.name} must be {param.checker.help()}, not {shown}{hint}"
        ) from None
