"""From a YAML file and a command line to frozen settings: nothing unknown, nothing guessed."""

import difflib
import math
import os
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fastargs import Config, Param

from fastproj.errors import InputError, SettingError
from fastproj.settings.checkers import File, Value

BASE = "base"  # the one key of a file that is no setting: the recipe to read before it


@dataclass(frozen=True)
class Settings:
    """Every setting's value and where it came from; frozen. ``settings.optim.lr`` reads one."""

    _values: dict[str, Value]
    _sources: dict[str, str]

    def __getattr__(self, section: str) -> Any:
        # An underscore is Python's own question (copy, pickle), asked before the fields exist.
        values = {} if section.startswith("_") else self._values
        split = {tuple(key.split(".")): value for key, value in values.items()}
        found = {name: value for (group, name), value in split.items() if group == section}
        if not found:
            raise AttributeError(f"no section {section!r}")
        return namedtuple(section, list(found))(**found)

    def flat(self) -> dict[str, Value]:
        """``{"section.name": value}`` in the order of declaration."""
        return dict(self._values)

    def sources(self) -> dict[str, str]:
        """``{"section.name": "default" | "file PATH" | "command line"}``."""
        return dict(self._sources)

    def to_yaml(self) -> str:
        """The text of ``config.yaml``: each value, its source as a comment; ``--cfg`` reads it."""
        lines: list[str] = []
        for key, value in self._values.items():
            section, name = key.split(".")
            if f"{section}:" not in lines:
                lines.append(f"{section}:")
            lines.append(f"  {name}: {_yaml(value)}  # {self._sources[key]}")
        return "\n".join(lines) + "\n"


class _Given(NamedTuple):
    name: str
    text: str | list[str] | None
    source: str
    where: str


def load(schema: Config, argv: Sequence[str], prog: str, description: str) -> Settings:
    """Read ``--cfg FILE``, then ``--section.name VALUE``, over the defaults of ``schema``.

    ``--section.name=VALUE`` and, where it is unique, ``--name`` do as well; the last one wins.
    A file's ``base: OTHER`` reads that file first, from the folder of the one that names it.
    ``--help`` prints every setting and leaves with exit code 0. ``--debug`` is ``run_command``'s.

    Raises ``SettingError`` for a setting that is unknown, missing, ill-typed, out of range or twice
    in one file, and ``InputError`` for a file that is missing, empty, no YAML mapping or its own
    base.
    """
    params: dict[str, Param] = {".".join(path): param for path, param in schema.entries.items()}
    if "--help" in argv or "-h" in argv:
        print(_help(schema, params, prog, description))
        raise SystemExit(0)
    cfg, given = _read_command_line(argv, params)
    values: dict[str, Value] = {name: param.default for name, param in params.items()}
    sources = dict.fromkeys(params, "default")
    if cfg is not None:
        if "run.name" in params:
            values["run.name"], sources["run.name"] = Path(cfg).stem, f"file {cfg}"
        given = [*_read_recipe(cfg, params), *given]
    for name, text, source, where in given:
        try:
            values[name] = params[name].checker.check(text)
        except ValueError:
            wanted = params[name].checker.help()
            shown = "null" if text is None else repr(text)
            raise SettingError(f"{where}: {name} must be {wanted}, not {shown}") from None
        sources[name] = source
    for name, param in params.items():
        if param.required and values[name] is None:
            raise SettingError(f"{name} is missing: give --{name} VALUE ({param.desc})")
    return Settings(values, sources)


def _read_command_line(
    argv: Sequence[str], params: dict[str, Param]
) -> tuple[str | None, list[_Given]]:
    """The file that ``--cfg`` names and the settings given as options."""
    cfg, given, where = None, [], "command line"
    tokens = iter(argv)
    for token in tokens:
        if token == "--debug":
            continue
        option, equals, text = token.partition("=")
        if not option.startswith("--"):
            raise SettingError(f"{where}: {token!r} follows no option; a list is written 1,2,3")
        name = option[2:] if option == "--cfg" else _full_name(option[2:], params)
        if not equals:
            text = next(tokens, "--")  # Nothing left reads as an option: no value.
            if text.startswith("--"):
                raise SettingError(f"{where}: {option} needs a value: {option} VALUE")
        if name != "cfg":
            given.append(_Given(name, text, where, where))
        elif cfg is None and text.isprintable():
            cfg = text
        else:
            raise SettingError(f"{where}: --cfg takes one file, once")
    return cfg, given


def _full_name(name: str, params: dict[str, Param]) -> str:
    """``section.name`` of an option; the section may be left out where the name is unique."""
    if name in params:
        return name
    found = [full for full in params if full.split(".")[1] == name]
    if len(found) > 1:
        raise SettingError(f"command line: --{name} may be any of --{', --'.join(found)}")
    if not found:
        right = _nearest(name, [*params, "cfg", "help", "debug"])
        raise SettingError(f"command line: unknown setting --{name}; did you mean --{right}?")
    return found[0]


def _read_recipe(
    path: str,
    params: dict[str, Param],
    chain: tuple[str, ...] = (),
    asked: str = "--cfg takes a YAML file",
) -> list[_Given]:
    """The settings of a file, after those of the file that it is based on, so that its own win.

    ``chain``: the files that led here, each based on the next; ``asked``: who named ``path``.
    """
    chain = (*chain, path)
    if os.path.realpath(path) in map(os.path.realpath, chain[:-1]):
        raise InputError(f"{' -> '.join(chain)}: a recipe cannot be its own base; {asked}")
    before: list[_Given] = []
    own = list(_read_file(path, params, asked))  # whole: its own mistakes come before its base's
    for item in own:
        if item.name == BASE:
            try:
                base = str(Path(path).parent / str(File().check(item.text)))
            except ValueError:
                raise SettingError(f"{item.where}: base must be the path of a YAML file") from None
            before = _read_recipe(base, params, chain, f"{item.where}, names it as its base")
    return before + [item for item in own if item.name != BASE]


def _read_file(path: str, params: dict[str, Param], asked: str) -> Iterator[_Given]:
    """What one YAML file gives. Nodes, not objects: they keep lines, duplicates and text."""
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {asked}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no sections"
        raise InputError(f"{path} {what}; write 'section:' and below it, indented, 'name: value'")
    sections = {name.split(".")[0] for name in params}
    lines: dict[str, int] = {}
    todo = [("", root)]
    while todo:
        prefix, mapping = todo.pop()
        for key, node in mapping.value:
            line = key.start_mark.line + 1
            where = f"{path}, line {line}"
            if not isinstance(key, yaml.ScalarNode):
                raise SettingError(f"{where}: the name of a setting is plain text")
            name = prefix + key.value
            if name in lines:
                raise SettingError(f"{where}: {name} is already set on line {lines[name]}")
            lines[name] = line
            if name in params or name == BASE:
                yield _Given(name, _text(node, where), f"file {path}", where)
            elif name not in sections:
                right = _nearest(name, [*params, BASE])
                raise SettingError(f"{where}: unknown setting {name!r}; did you mean {right!r}?")
            elif isinstance(node, yaml.MappingNode):
                todo.append((f"{name}.", node))
            elif _text(node, where) is not None:
                raise SettingError(f"{where}: {name} is a section; write its settings below it")


def _text(node: yaml.Node, where: str) -> str | list[str] | None:
    """A node as its checker takes it: the text as it stands, a list of texts, or None for null."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode) and all(
        isinstance(item, yaml.ScalarNode) for item in node.value
    ):
        return [item.value for item in node.value]
    raise SettingError(f"{where}: a setting takes one value or one flat list")


def _nearest(name: str, names: list[str]) -> str:
    """The likest name; the part after the dot counts twice, as sections are easily mistaken."""

    def likeness(other: str) -> float:
        short = difflib.SequenceMatcher(None, name.split(".")[-1], other.split(".")[-1]).ratio()
        return short + difflib.SequenceMatcher(None, name, other).ratio()

    return max(names, key=likeness)


def _yaml(value: Value) -> str:
    """One value as YAML 1.1 on one line (``3.0e-05``: without the dot others read it as text)."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.splitlines()[0]


def _help(schema: Config, params: dict[str, Param], prog: str, description: str) -> str:
    lines = [
        f"usage: {prog} [--cfg FILE] [--section.name VALUE ...] [--help] [--debug]",
        description,
        "The command line goes before the file, the file before the defaults shown here.",
        "A section may be left out where the name is unique.",
        "In a file, base: OTHER reads another file first, from its own folder; its own lines win.",
    ]
    width = max(len(name) for name in params)
    for section in schema.sections.values():
        lines += ["", f"{section.ns[0]}: {section.desc}"]
        for name, param in params.items():
            if param.section is section:
                default = "required" if param.required else _yaml(param.default)
                lines.append(
                    f"  --{name:<{width}}  {default:<8}  {param.desc} ({param.checker.help()})"
                )
    return "\n".join(lines)
