"""Two hosts: network namespaces of this machine, joined by a virtual link that can be cut."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.213.0.1", "10.213.0.2")


def missing() -> str:
    """What the namespaces need and this machine lacks; empty where nothing."""
    if os.geteuid():
        return "root"
    return "" if shutil.which("ip") else "ip (apt-get install iproute2)"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Hosts:
    """The namespaces ``names``, with ``ADDRESSES``; host n's end of the link is ``linkn``."""

    def __init__(self) -> None:
        self.names = [f"fastproj{os.getpid()}-{number}" for number in (0, 1)]

    def link(self, state: str) -> None:
        """``up`` or ``down``."""
        ip("-n", self.names[1], "link", "set", "link1", state)

    def torchrun(self, words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
        """One rank on each host, by a torchrun of its own that meets the other at host 0."""
        started = []
        for number, name in enumerate(self.names):
            argv = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
                    "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1",
                    f"--master-addr={ADDRESSES[0]}", "--master-port=29500",
                    "-m", "fastproj.train", *words]  # fmt: skip
            # Gloo would take the host's name, which both have.
            own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"link{number}"}
            with (folder / f"host{number}.log").open("ab") as log:
                started.append(
                    subprocess.Popen(argv, stdout=log, stderr=log, text=True, env=os.environ | own)
                )
        return started


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts, of which nothing is left at the end."""
    hosts = Hosts()
    try:
        for name in hosts.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        a, b = hosts.names
        ip("link", "add", "link0", "netns", a, "type", "veth", "peer", "name", "link1", "netns", b)
        for number, (name, address) in enumerate(zip(hosts.names, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"link{number}")
            ip("-n", name, "link", "set", f"link{number}", "up")
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
