"""Functions that tests have a worker run: honest ones and misbehaving ones. Works on Python 3.8."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from mhabridge.errors import UnsupportedError


def echo(framework, payload):
    return payload


def add_one(framework, payload):
    return {"sum": payload["x"] + 1}


def facts(framework, payload):
    return {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "launcher": os.getppid(),
        "version": list(sys.version_info[:2]),
        "main_thread": threading.current_thread() is threading.main_thread(),
        "isolated": sys.flags.isolated,
        "mhabridge": sys.modules["mhabridge"].__spec__.origin,
    }


def segfault(framework, payload):
    print("about to read address 0", file=sys.stderr)
    ctypes.string_at(0)


def abort(framework, payload):
    os.abort()


def exit_now(framework, payload):
    os._exit(payload["status"])


def system_exit(framework, payload):
    sys.exit("enough")


def kill_self(framework, payload):
    os.kill(os.getpid(), signal.SIGKILL)


def print_wildly(framework, payload):
    for _ in range(payload["lines"]):
        print("from Python " + "x" * 100)
        os.write(1, b"to descriptor 1 " + b"y" * 100 + b"\n")
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    subprocess.run(["echo", "from a child process"], check=True)
    return "done"


def flood_stderr(framework, payload):
    for number in range(payload["lines"]):
        os.write(2, b"%d " % number + b"z" * 1000 + b"\n")
    if payload["die"]:
        os.abort()
    return "done"


def hang(framework, payload):
    time.sleep(1000)


def hang_in_c(framework, payload):
    """Never back in Python, and the GIL is held: PyDLL does not release it."""
    ctypes.PyDLL(None).sleep(1000)


def grandchild(framework, payload):
    return subprocess.Popen(["sleep", "1000"]).pid


def grandchild_and_die(framework, payload):
    child = subprocess.Popen(["sleep", "1000"])
    with open(payload["path"], "w") as file:
        file.write(str(child.pid))
    os.abort()


def raise_ours(framework, payload):
    raise UnsupportedError("attn_mask", given="3 axes", expected="2", advice="Drop one.")


def raise_theirs(framework, payload):
    numbers = {}
    return numbers["missing on purpose"]


def unsendable(framework, payload):
    return {"a": object()}


def close_stderr(framework, payload):
    os.close(2)
    return "done"


def big(framework, payload):
    return {"x": np.full(payload["size"], payload["value"])}
