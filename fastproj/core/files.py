"""Atomic writes of files, their hashes, and the recipes that come with fastproj."""

import contextlib
import glob
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom, RawIOBase
from pathlib import Path
from typing import BinaryIO

from fastproj.core.errors import InputError

LEFT_BEHIND = 3600.0  # seconds without a write; not less, as some file systems have no locks


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into an ``InputError`` of one line.

    torch's zip writer raises ``RuntimeError`` on top of the ``OSError``: that one is named too.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise InputError(
            f"cannot write {path}: {reason.strerror or reason}; make room or fix the permissions"
        ) from error


def append(file: RawIOBase, line: bytes) -> None:
    """Append all of ``line`` to ``file``, which is unbuffered, or nothing.

    A disk that fills up takes the first part of a write and says so with the next one.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) or 0 :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file that replaces ``path`` when the block ends without an exception.

    The file is synced and renamed, then its folder is synced. After an exception the temporary
    file is removed and ``path`` stays as it was; a killed process leaves ``<name>.<hex>.tmp``
    behind, which a later write of ``path`` removes. Raises ``InputError`` if the file cannot be
    written (full disk, no permission, read-only mount).
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path):
            remove_left_behind(path)
            with temporary.open("x+b") as file:
                lock(file)  # says that it has a writer
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        # A read-only file system refuses this as well, and its refusal would hide the first one.
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_left_behind(path: Path) -> None:
    """Remove temporary files of ``path`` whose writer was killed: old, and locked by nobody."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > LEFT_BEHIND:
                with temporary.open("rb") as file:
                    if lock(file):
                        temporary.unlink()


def lock(file: BinaryIO) -> bool:
    """Lock an open file; returns False where another process (or another open file) holds it.

    The lock ends when the file is closed, or with the process, however that ends. Where system or
    file system have no locks, nothing is locked.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all. Raises as ``replacing`` does."""
    with replacing(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_recipe(name: str) -> str:
    """``name`` itself where such a file is, else the recipe of that name that fastproj brings.

    ``in100``, ``in100.yaml`` and ``rcfg/in100.yaml`` name the same one. Where fastproj brings none,
    ``name`` comes back as it is: whoever opens it says what is wrong.
    """
    package = Path(__file__).parents[1]
    stem = name.removeprefix("rcfg/").removesuffix(".yaml")
    shipped = [package / "rcfg" / f"{stem}.yaml", package.parent / "rcfg" / f"{stem}.yaml"]
    found = [Path(name), *shipped]  # an installed package holds rcfg, a checkout has it beside it
    return str(next((path for path in found if path.is_file()), name))
