"""A worker on another host: through a real sshd on loopback, with its own keys and configuration."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mhabridge.backends import backend, environments
from mhabridge.backends.worker import Worker
from mhabridge.errors import BackendError
from tests.test_worker_failures import TRICKS, assert_gone

pytestmark = pytest.mark.ssh


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The client's configuration for the host "loopback"; "nowhere" is a port where nobody listens."""
    sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not sshd or not shutil.which("ssh"):
        pytest.skip("needs ssh and sshd: install openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    port, closed_port = free_port(), free_port()
    (folder / "sshd_config").write_text(server_config(folder, port), encoding="utf-8")
    (folder / "ssh_config").write_text(client_config(folder, port, closed_port), encoding="utf-8")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd wants to lock itself in before a login
    log = folder / "sshd.log"
    server = subprocess.Popen([sshd, "-D", "-E", str(log), "-f", str(folder / "sshd_config")])
    try:
        wait_for(port, server, log)
        yield folder / "ssh_config"
    finally:
        server.terminate()
        server.wait()


def server_config(folder: Path, port: int) -> str:
    return f"""
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""


def client_config(folder: Path, port: int, closed_port: int) -> str:
    return f"""
Host loopback
    Port {port}
Host nowhere
    Port {closed_port}
Host *
    HostName 127.0.0.1
    User {getpass.getuser()}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"sshd does not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.05)


@pytest.fixture
def worker(ssh_config: Path) -> Iterator[Worker]:
    made = Worker(
        sys.executable,
        "numpy",
        ssh="loopback",
        ssh_args=("-F", str(ssh_config)),
        extra_modules=TRICKS,
        start_timeout=30,
    )
    yield made
    made.close()


@pytest.mark.parametrize("size", [3, 100_000, 3_000_000])
def test_arrays_go_through_the_channel(worker: Worker, size: int) -> None:
    array = np.random.default_rng(0).standard_normal(size)
    found = worker.call("ping", {"x": array, "t": (1, array[::-1])})
    assert found["x"].tobytes() == array.tobytes()
    assert found["t"][1].tobytes() == array[::-1].tobytes()


def test_a_crash_there_says_how(worker: Worker) -> None:
    with pytest.raises(BackendError) as raised:
        worker.call("tricks:segfault", {})
    assert "was killed by SIGSEGV" in raised.value.given
    assert "about to read address 0" in raised.value.advice
    assert "loopback" in raised.value.subject
    assert worker.call("ping", {"a": 1}) == {"a": 1}


def test_a_limit_holds_there_and_nothing_is_left_there(worker: Worker) -> None:
    facts = worker.call("tricks:facts", {})
    with pytest.raises(BackendError, match="no answer within the limit"):
        worker.call("tricks:hang_in_c", {}, timeout=0.5)
    assert_gone(facts["pid"], facts["launcher"], within=2.0)


def test_nothing_is_left_there_when_the_connection_is_cut(worker: Worker) -> None:
    facts = worker.call("tricks:facts", {})
    grandchild = worker.call("tricks:grandchild", {})
    os.kill(child_of(launcher_of(worker)), signal.SIGKILL)  # ssh itself
    assert_gone(facts["pid"], facts["launcher"], grandchild, within=2.0)


def launcher_of(worker: Worker) -> int:
    assert worker._process is not None
    assert worker._process._launcher is not None
    return worker._process._launcher.pid


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()[0])


def test_an_unreachable_host_is_a_clear_error(ssh_config: Path) -> None:
    away = Worker(sys.executable, "numpy", ssh="nowhere", ssh_args=("-F", str(ssh_config)))
    with pytest.raises(BackendError) as raised:
        away.call("ping", {})
    assert "could not be reached" in raised.value.given
    assert "Connection refused" in raised.value.advice


def test_a_missing_interpreter_there_is_a_clear_error(ssh_config: Path) -> None:
    wrong = Worker("/nonexistent/python", "numpy", ssh="loopback", ssh_args=("-F", str(ssh_config)))
    with pytest.raises(BackendError, match="/nonexistent/python") as raised:
        wrong.call("ping", {})
    assert "exit status 127" in raised.value.given


def test_it_can_be_registered_by_name(ssh_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHABRIDGE_HOME", str(tmp_path))
    environments.add("there", sys.executable, ssh="loopback", ssh_args=("-F", str(ssh_config)), framework="numpy")
    found = backend("there")
    assert (found.info.where, found.info.host) == ("worker", "loopback")
    assert found.call("ping", {"a": 1}) == {"a": 1}
