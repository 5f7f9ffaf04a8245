"""Plugins: Python files or modules that register entries in the tables, before any is chosen."""

import importlib
import importlib.util
import os
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path

from fastproj.core.errors import InputError
from fastproj.core.files import sha256

MARK = "#sha256="  # between a plugin's name and the hash it had


def load_plugin(given: str, folder: str, where: str) -> str:
    """Import a plugin once per content; returns ``"name#sha256=…"``, its name made absolute.

    ``given``: a file ``*.py``, found from ``folder``, or the name of an importable module, of which
    the first file is hashed; either with the hash it should have. ``where`` it was named begins a
    message. Raises ``InputError`` where it is missing, is not what it was, or fails.
    """
    name, _, recorded = given.partition(MARK)
    if name.endswith(".py"):
        name = os.path.abspath(os.path.join(folder, os.path.expanduser(name)))
        path = name
    else:
        path = _origin(name, where)
    try:
        digest = sha256(Path(path))
    except OSError as error:
        raise InputError(f"{where}: cannot read plugin {path}: {error.strerror}") from None
    if recorded and recorded != digest:
        raise InputError(
            f"{where}: plugin {path} has changed since this was written (SHA-256 {digest[:12]}…, "
            f"it was {recorded[:12]}…): restore the file as it was, or start another run with it"
        )
    alias = f"fastproj_plugin_{Path(name).stem}_{digest[:12]}" if name == path else name
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, path) if name == path else None
        _import(alias, spec, path)
    return f"{name}{MARK}{digest}"


def _origin(module: str, where: str) -> str:
    why = ""
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # it imports the package around a module: code of the user's
        spec, why = None, f" ({type(error).__name__}: {' '.join(str(error).split())})"
    if spec is None or spec.origin is None or not spec.has_location:
        raise InputError(
            f"{where}: plugin {module!r} is neither a file (*.py) nor a module that can be "
            f"imported{why}"
        )
    return spec.origin


def _import(alias: str, spec: ModuleSpec | None, path: str) -> None:
    """Run it; whatever it raises becomes one line that names its file and line."""
    try:
        if spec is None:
            importlib.import_module(alias)
        else:
            assert spec.loader is not None
            sys.modules[alias] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(alias, None)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise InputError(f"plugin {path}, line {line}: {type(error).__name__}: {error}") from error
