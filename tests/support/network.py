"""A folder of this machine, mounted through a network protocol: sshfs, SFTP and TCP.

apt-get install sshfs openssh-sftp-server     # and a /dev/fuse that may be used
"""

import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SERVER = Path("/usr/lib/openssh/sftp-server")


def missing() -> str:
    """What a mount needs and this machine lacks; empty where nothing."""
    lacks = [name for name in ("sshfs", "fusermount3") if not shutil.which(name)]
    lacks += [str(path) for path in (SERVER, Path("/dev/fuse")) if not path.exists()]
    return ", ".join(lacks)


@contextmanager
def mounted(folder: Path, at: Path) -> Iterator[Callable[[], None]]:
    """``folder``, to be read at ``at``; yields what cuts the connection for good."""
    servers: list[subprocess.Popen] = []
    at.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        ends = {"stdin": connection, "stdout": connection}
                        servers.append(subprocess.Popen([SERVER, "-R"], **ends))

        def cut() -> None:
            listening.close()
            for server in servers:
                server.kill()
                server.wait()

        threading.Thread(target=serve, daemon=True).start()
        port = listening.getsockname()[1]
        subprocess.run(
            ["sshfs", "-o", f"directport={port},ro", f"127.0.0.1:{folder}", at], check=True
        )
        try:
            yield cut
        finally:
            if at.is_mount():  # without its server it ends by itself
                subprocess.run(["fusermount3", "-u", "-z", at], check=True)
            cut()
