"""An SFTP server for tests: OpenSSH's sshd on the loopback interface."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.servers.process import answers, server

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
PidFile none
AuthorizedKeysFile {directory}/user_key.pub
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
MaxStartups 200
MaxSessions 200
Subsystem sftp internal-sftp
LogLevel VERBOSE
"""


@dataclass(frozen=True, kw_only=True)
class SftpServer:
    """A running server, which serves the files of this machine as the user who runs it."""

    port: int
    key: Path

    @property
    def options(self) -> dict[str, Any]:
        """What fsspec's sftp is opened with."""
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "username": getpass.getuser(),
            "key_filename": str(self.key),
            "look_for_keys": False,
            "allow_agent": False,
        }

    def url(self, path: Path) -> str:
        """URL of ``path``; all options but ``host`` and ``port`` in its query."""
        user = getpass.getuser()
        return (
            f"sftp://{user}@127.0.0.1:{self.port}{path}?key_filename={self.key}"
            "&look_for_keys=false&allow_agent=false"
        )


def find_sshd() -> str | None:
    """The path of sshd, which needs to be called by it."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def run_sftp(directory: Path, sshd: str) -> Iterator[SftpServer]:
    """A server for the time of the block; ``directory`` takes its keys."""
    for name in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)],
            check=True,
            timeout=60,
        )
    if os.getuid() == 0:
        # Where sshd, as root, puts its unprivileged half. Made by its service otherwise.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    port = free_port()
    config = directory / "sshd_config"
    config.write_text(_CONFIG.format(port=port, directory=directory))
    command = [sshd, "-D", "-e", "-f", str(config)]
    with server(command, directory / "sshd.log", lambda: answers(port)):
        yield SftpServer(port=port, key=directory / "user_key")
