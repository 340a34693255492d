"""A line to a worker on this host: messages over a Unix socket, read by the very threads that wait for them.

Beside execnet's channel, which serves for starting and for other hosts: there each message first wakes a receiver
thread, on either side, and an empty call takes twice as long.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

_LENGTH = struct.Struct("!Q")


class Line:
    """One end of a line.

    Example:
        >>> here, there = map(Line, socket.socketpair())
        >>> here.put(b"hello")
        >>> there.get()
        b'hello'
        >>> here.close(), there.close()
        (None, None)
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def put(self, message: bytes) -> None:
        """Send a message."""
        self._connection.sendall(_LENGTH.pack(len(message)) + message)

    def get(self) -> bytes:
        """Receive a message.

        Raises:
            EOFError: the other end is closed.
        """
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(size)

    def cut(self) -> None:
        """End the connection for every process that holds it; a ``get`` that waits in another thread returns."""
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up. What runs in the other process decides what that means."""
        self._connection.close()

    def _exactly(self, size: int) -> bytes:
        data = self._connection.recv(size)
        while len(data) < size:
            more = self._connection.recv(size - len(data))
            if not more:
                raise EOFError("the line was closed")
            data += more
        return data


class Offer:
    """A socket in a private directory, to which the worker connects."""

    def __init__(self, place: str) -> None:
        self.path = os.path.join(place, "line")
        self._server = socket.socket(socket.AF_UNIX)
        try:
            self._server.bind(self.path)
            self._server.listen(1)
        except OSError:
            self._server.close()
            raise

    def accept(self) -> Line:
        """The line, once the worker has connected."""
        return Line(self._server.accept()[0])

    def close(self) -> None:
        """Withdraw the offer; a line stays."""
        self._server.close()


def connect(path: str) -> Line:
    """The worker's end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return Line(connection)
