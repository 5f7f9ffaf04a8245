"""From a YAML file and a command line to frozen settings: nothing unknown, nothing guessed."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from fastproj.core.errors import InputError, SettingError
from fastproj.core.files import shipped_recipe
from fastproj.core.table import nearest
from fastproj.settings.checkers import File
from fastproj.settings.choose import choose
from fastproj.settings.plugins import load_plugin
from fastproj.settings.schema import Given, S, Schema, as_yaml

BASE = "base"  # two keys of a file that are no settings: the recipe to read before it,
PLUGINS = "plugins"  # and what to import before anything is chosen
ARGV = "command line"
LONGEST = 200_000  # characters of a file, which PyYAML reads in 2 s; ours have at most 8,000
SECRET = re.compile(  # in a URL: before the host, or in its query, as signed links have it
    r"://[^/?#\s]*@|://.*[?&]([^=&]*(token|key|secret|password|signature|credential)|sig)=",
    re.IGNORECASE,
)
DEPTH = 4  # dots in arms.NAME.settings.section.name, the longest name in a block


class _Plugin(NamedTuple):
    name: str
    folder: str
    where: str


def load(
    schema: Schema[S],
    argv: Sequence[str],
    prog: str,
    description: str,
    *,
    config: Path | None = None,
) -> S:
    """Read ``--cfg FILE``, then ``--section.name VALUE``, over the defaults of ``schema``.

    ``config`` is read in place of ``--cfg``, which is then refused: for a command that takes a run
    folder.

    ``--section.name=VALUE`` and, where it is unique, ``--name`` do as well; the last one wins.
    A file's ``base: OTHER`` reads that file first, from the folder of the one that names it; its
    ``plugins: [FILE, MODULE]``, and ``--plugins FILE,MODULE``, are imported before anything is
    chosen. ``--help`` prints the settings that the command reads (the last word of ``prog``, in
    ``schema.readers``) and leaves with exit code 0. ``--debug`` is ``run_command``'s.

    Raises ``SettingError`` for a setting that is unknown, missing, ill-typed, out of range, twice
    in one file, read by nothing or a URL with a password, and ``InputError`` for a file that is
    missing, empty, no YAML mapping or its own base, and for a plugin that fails or has changed.
    """
    command = re.split(r"[ .]", prog)[-1]
    if "--help" in argv or "-h" in argv:
        with suppress(SettingError):
            _load_plugins(_read_command_line(argv)[2])
        usage = f"{prog} FOLDER" if config else f"{prog} [--cfg FILE]"
        print(_help(schema, command, usage, description))
        raise SystemExit(0)
    cfg, given, wanted = _read_command_line(argv)
    if config:
        if cfg is not None:
            raise SettingError(f"{ARGV}: {prog} reads {config} and takes no --cfg")
        cfg = str(config)
    given = [item._replace(name=_full_name(item.name, schema, wanted)) for item in given]
    if cfg is not None:
        cfg = shipped_recipe(cfg)
        before, plugins = _read_recipe(cfg, schema)
        for named in {"run.name", "study.name"} & schema.params.keys():
            before.insert(0, Given(named, Path(cfg).stem, "default", cfg))
        given, wanted = before + given, plugins + wanted
    _refuse_secrets(given)
    blocks = tuple(item for item in given if schema.in_block(item.name))
    given = [item for item in given if not schema.in_block(item.name)]
    loaded = _load_plugins(wanted)
    _refuse_unknown(schema, given)
    chosen = choose(schema, given)
    for item in given:
        if item.source == ARGV and not schema.reads(command, item.name):
            others = [name for name in ("train", *schema.readers) if schema.reads(name, item.name)]
            raise SettingError(
                f"{ARGV}: --{item.name} is not read by {command}, but by {' and '.join(others)}: "
                "leave it out"
            )
    for name, param in schema.params.items():
        if param.required and chosen.all[name] is None and schema.reads(command, name):
            raise SettingError(f"{name} is missing: give --{name} VALUE ({param.desc})")
    return schema.build(
        chosen.all,
        chosen.options,
        plugins=loaded,
        _values={name: chosen.all[name] for name in chosen.sources},
        _sources=chosen.sources,
        _blocks=blocks,
    )


def _load_plugins(wanted: Sequence[_Plugin]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(load_plugin(*plugin) for plugin in wanted))


def _plugins(text: str | list[str] | None, folder: str, where: str) -> list[_Plugin]:
    """A list of plugins as text: ``a.py,b`` or a YAML list."""
    names = re.sub(r"^\[(.*)\]$", r"\1", text).split(",") if isinstance(text, str) else text
    names = [name.strip() for name in names or []]
    if not all(name and name.isprintable() for name in names):
        raise SettingError(f"{where}: plugins are Python files or modules: a.py,b")
    return [_Plugin(name, folder, where) for name in names]


def _read_command_line(argv: Sequence[str]) -> tuple[str | None, list[Given], list[_Plugin]]:
    """The file that ``--cfg`` names, the options as they stand, and the plugins."""
    cfg, given, plugins = None, [], []
    tokens = iter(argv)
    for token in tokens:
        if token in ("--debug", "--help", "-h"):
            continue
        option, equals, text = token.partition("=")
        if not option.startswith("--"):
            raise SettingError(f"{ARGV}: {token!r} follows no option; a list is written 1,2,3")
        if not equals:
            text = next(tokens, "--")  # Nothing left reads as an option: no value.
            if text.startswith("--"):
                raise SettingError(f"{ARGV}: {option} needs a value: {option} VALUE")
        if option == f"--{PLUGINS}":
            plugins += _plugins(text, "", ARGV)
        elif option != "--cfg":
            given.append(Given(option[2:], text, ARGV, ARGV))
        elif cfg is None and text.isprintable():
            cfg = text
        else:
            raise SettingError(f"{ARGV}: --cfg takes one file, once")
    return cfg, given, plugins


def _full_name(name: str, schema: Schema, plugins: Sequence[_Plugin]) -> str:
    """``section.name`` of an option; the section may be left out where the name is unique."""
    if name in schema.params or schema.is_option(name) or schema.in_block(name):
        return name
    found = [full for full in schema.params if full.split(".")[1] == name]
    if not found and "." not in name:  # a hyperparameter that only a plugin's entry names
        _load_plugins(plugins)
        found = [f"{part}.{name}" for part in schema.choices if schema.entries_with(part, name)]
    if len(found) > 1:
        raise SettingError(f"{ARGV}: --{name} may be any of --{', --'.join(found)}")
    if not found:
        right = nearest(name, [*schema.params, "cfg", PLUGINS, "help", "debug"])
        raise SettingError(f"{ARGV}: unknown setting --{name}; did you mean --{right}?")
    return found[0]


def _refuse_unknown(schema: Schema, given: Sequence[Given]) -> None:
    """``SettingError`` for a hyperparameter that no entry names, plugins' entries included."""
    for item in given:
        section, _, short = item.name.partition(".")
        if item.name in schema.params or schema.entries_with(section, short):
            continue
        dashes, right = "--" if item.source == ARGV else "", nearest(item.name, schema.params)
        name = f"{dashes}{item.name}" if dashes else repr(item.name)
        right = f"{dashes}{right}" if dashes else repr(right)
        raise SettingError(f"{item.where}: unknown setting {name}; did you mean {right}?")


def _refuse_secrets(given: Sequence[Given]) -> None:
    """``SettingError`` for a URL with a password or token: a run folder keeps its settings."""
    for item in given:
        texts = item.text if isinstance(item.text, list) else [item.text or ""]
        if any(map(SECRET.search, texts)):
            raise SettingError(
                f"{item.where}: {item.name} is a URL with a password or token, which would be kept "
                "with the results: leave it out and give it by the environment or ~/.netrc"
            )


def _read_recipe(path: str, schema: Schema) -> tuple[list[Given], list[_Plugin]]:
    """The settings and plugins of a file, after those of the one it is based on: its own win."""
    chain, seen, asked = [path], {os.path.realpath(path)}, "--cfg takes a YAML file"
    layers: list[list[Given]] = []
    while True:
        own = list(_read_file(path, schema, asked))
        layers.insert(0, own)
        base = next((item for item in own if item.name == BASE), None)
        if base is None:
            break
        try:
            path = str(Path(path).parent / str(File().check(base.text)))
        except ValueError:
            raise SettingError(f"{base.where}: base must be the path of a YAML file") from None
        chain.append(path)
        asked = f"{base.where}, names it as its base"
        if os.path.realpath(path) in seen:
            raise InputError(f"{' -> '.join(chain)}: a recipe cannot be its own base; {asked}")
        seen.add(os.path.realpath(path))
    given, plugins = [], []
    for folder, layer in zip(map(os.path.dirname, reversed(chain)), layers, strict=True):
        given += [item for item in layer if item.name not in (BASE, PLUGINS)]
        for item in layer:
            if item.name == PLUGINS:
                plugins += _plugins(item.text, folder, item.where)
    return given, plugins


def _read_file(path: str, schema: Schema, asked: str) -> Iterator[Given]:
    """What one YAML file gives. Nodes, not objects: they keep lines, duplicates and text."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise InputError(f"{path} is longer than {LONGEST:,} characters, so no recipe; {asked}")
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {asked}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    except RecursionError:
        raise InputError(
            f"{path} is nested too deeply: write 'section:' and below it, indented, 'name: value'"
        ) from None
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no sections"
        raise InputError(f"{path} {what}; write 'section:' and below it, indented, 'name: value'")
    yield from _read_mapping(root, "", path, schema, {})


def _read_mapping(
    mapping: yaml.MappingNode, prefix: str, path: str, schema: Schema, lines: dict[str, int]
) -> Iterator[Given]:
    """What a mapping gives, in its order; ``lines``: where each name was given before."""
    for key, node in mapping.value:
        line = key.start_mark.line + 1
        where = f"{path}, line {line}"
        if not isinstance(key, yaml.ScalarNode):
            raise SettingError(f"{where}: the name of a setting is plain text")
        name = prefix + key.value
        if name in lines:
            raise SettingError(f"{where}: {name} is already set on line {lines[name]}")
        lines[name] = line
        inside = isinstance(node, yaml.MappingNode)
        known = name in schema.params or name in (BASE, PLUGINS)
        if schema.in_block(name):
            if name.count(".") > DEPTH:
                raise SettingError(f"{where}: {name} is nested too deeply")
            if inside and node.value:
                yield from _read_mapping(node, f"{name}.", path, schema, lines)
            else:  # "name: {}" is a name with nothing below it, as "name:" is
                yield Given(name, None if inside else _text(node, where), f"file {path}", where)
        elif known or (schema.is_option(name) and not inside):
            yield Given(name, _text(node, where), f"file {path}", where)
        elif name not in schema.groups:
            right = nearest(name, [*schema.params, *schema.blocks, BASE, PLUGINS])
            raise SettingError(f"{where}: unknown setting {name!r}; did you mean {right!r}?")
        elif inside:
            yield from _read_mapping(node, f"{name}.", path, schema, lines)
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


def _help(schema: Schema, command: str, prog: str, description: str) -> str:
    lines = [
        f"usage: {prog} [--section.name VALUE ...] [--plugins FILE,MODULE,...] [--help] [--debug]",
        description,
        "The command line goes before the file, the file before the defaults shown here.",
        "A section may be left out where the name is unique.",
        "In a file, base: OTHER reads another file first, from its own folder; its own lines win.",
        "Plugins are Python files or modules that add entries; in a file: plugins: [FILE, MODULE].",
    ]
    if schema.blocks:
        lines += [
            f"A file also has the blocks {', '.join(schema.blocks)}: rcfg/study/ has examples. "
            "--arms.NAME.settings.section.name VALUE changes one value in them."
        ]
    params = {name: p for name, p in schema.params.items() if schema.reads(command, name)}
    width = max(map(len, params), default=0)
    before = ""
    for name, param in params.items():
        section = name.split(".")[0]
        if section != before:
            lines += ["", f"{section}: {schema.groups[section].__doc__}"]
        before = section
        default = "required" if param.required else as_yaml(param.default)
        lines.append(f"  --{name:<{width}}  {default:<8}  {param.desc} ({param.checker.help()})")
    return "\n".join(lines)
