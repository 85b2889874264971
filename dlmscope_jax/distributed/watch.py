"""Notices at once when another process of the job is gone.

jax would notice by its heartbeats, after minutes, and end the process with a page of C++ addresses; until then the others wait in a
collective. So every process keeps one connection to process 0. The system closes it when a process dies, whatever it died of;
process 0 then tells the others, and each stops: with an exception where its main thread runs into the broken collective, and
otherwise, a few seconds later, without one.
"""

import os
import secrets
import socket
import sys
import threading
from typing import Any, NoReturn, TextIO

_GRACE = 5.0  # seconds for the main thread to run into what is missing
_SECONDS_OF_SILENCE = 30  # after which the system takes a machine that does not answer for dead
_HELLO, _LOST, _DONE, _FAILED = "hello", "lost", "done", "failed"


class Watch:
    """This process' end of the connections.

    Process 0 calls ``listen`` and hands ``address`` to the others, which call ``connect``.
    """

    def __init__(self, index: int, count: int):
        """Process ``index`` of ``count``."""
        self.index, self.count = index, count
        self.address: list[Any] = []
        self._connections: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._noticed = threading.Event()
        self._ending = False

    def listen(self, name: str | None = None) -> None:
        """Process 0: waits for the others, in the background. ``name``: under which they know this machine, if that is known."""
        listener = socket.create_server(("", 0))
        token = secrets.token_hex(8)
        self.address = [[name] if name else _names_of_this_machine(), listener.getsockname()[1], token]
        _in_background(self._accept, listener, token)

    def connect(self, address: list[Any], timeout: float = 20.0) -> None:
        """Another process: connects to process 0.

        Raises:
          OSError: it cannot be reached.
        """
        names, port, token = address
        for name in names:
            try:
                connection = socket.create_connection((name, port), timeout=timeout)
                break
            except OSError as error:
                reason = error
        else:
            raise reason
        connection.settimeout(None)
        _keep_alive(connection)
        _send(connection, f"{_HELLO} {token} {self.index}")
        self._connections[0] = connection
        _in_background(self._follow, 0, _lines(connection))

    def lost(self, seconds: float = 0.0) -> str | None:
        """What happened to another process, None if nothing did; waits so long for the news."""
        self._noticed.wait(seconds)
        return self._lost

    def end(self, failure: str | None = None) -> None:
        """Says goodbye: done, or failed with a line that the others will print."""
        with self._lock:
            self._ending = True
            connections = list(self._connections.values())
        for connection in connections:
            _send(connection, _DONE if failure is None else f"{_FAILED} {' '.join(failure.split())}")

    def _accept(self, listener: socket.socket, token: str) -> None:
        with listener:
            while len(self._connections) < self.count - 1:
                connection, _ = listener.accept()
                _keep_alive(connection)
                _in_background(self._meet, connection, token)

    def _meet(self, connection: socket.socket, token: str) -> None:
        lines = _lines(connection)
        words = lines.readline().split()
        if len(words) != 3 or words[:2] != [_HELLO, token]:
            return connection.close()
        with self._lock:
            self._connections[int(words[2])] = connection
            late = self._lost
        if late is not None:
            _send(connection, f"{_LOST} {late}")
        self._follow(int(words[2]), lines)

    def _follow(self, index: int, lines: TextIO) -> None:
        """Reads what a process says until it says goodbye or is silent for ever."""
        try:
            for line in lines:
                word, _, rest = line.strip().partition(" ")
                if word == _DONE:
                    return
                if word == _LOST:
                    return self._note(rest)
                if word == _FAILED:
                    return self._note(f"process {index} of {self.count} stopped: {rest}")
        except OSError:
            pass
        self._note(f"process {index} of {self.count} stopped")

    def _note(self, news: str) -> None:
        with self._lock:
            if self._lost is not None or self._ending:
                return
            self._lost = news
            connections = list(self._connections.values()) if self.index == 0 else []
        for connection in connections:
            _send(connection, f"{_LOST} {news}")
        self._noticed.set()
        timer = threading.Timer(_GRACE, _leave, (told(news),))
        timer.daemon = True
        timer.start()


def told(news: str) -> str:
    """The line for people."""
    return f"{news}; the same command goes on from the last checkpoint"


def _leave(message: str) -> NoReturn:
    """Ends the process from another thread than the one that waits."""
    print(f"dlmscope: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _send(connection: socket.socket, line: str) -> None:
    try:
        connection.sendall(line.encode() + b"\n")
    except OSError:  # it is gone, which its own thread notices
        pass


def _lines(connection: socket.socket) -> TextIO:
    """What comes in. One for each connection: it reads ahead."""
    return connection.makefile("r", encoding="utf-8")


def _keep_alive(connection: socket.socket) -> None:
    """Lets the system ask whether the other machine is there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": (_SECONDS_OF_SILENCE - 10) // 5}
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _names_of_this_machine() -> list[str]:
    """Under which others may reach it, the best first."""
    name = socket.gethostname()
    try:
        return [name, socket.gethostbyname(name)]
    except OSError:
        return [name]


def _in_background(work: Any, *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()
