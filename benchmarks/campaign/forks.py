"""Ranks that are forked from this process, in which torch and transformers are imported but no group was started."""

from __future__ import annotations

import atexit
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import attrs

_PATIENCE = 120.0


@attrs.define
class Fork:
    """A forked rank, and what it has told so far."""

    pid: int
    pipe: BinaryIO
    told: list[Any] = attrs.field(factory=list)
    ended: bool = False
    reaped: bool = False

    def kill(self, number: int) -> None:
        """Send signal *number*, if the rank still runs."""
        if not self.ended:
            os.kill(self.pid, number)

    def reap(self) -> None:
        """Wait for the end of the rank, and read what it told last."""
        while not self.ended:
            _read([self], 1.0)
        if not self.reaped:
            os.waitpid(self.pid, 0)
            self.pipe.close()
            self.reaped = True


def fork(world: int, function: Callable[..., Any], *arguments: Any) -> list[Fork]:
    """Fork *world* ranks that call *function* with a function to tell something to the parent, and *arguments*."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    return [_forked(rank, world, port, function, arguments) for rank in range(world)]


def _forked(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Fork:
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Fork(pid, os.fdopen(mine, "rb", buffering=0))
    code = 1
    try:
        atexit._clear()  # type: ignore[attr-defined]  # what the parent does at its end is not for this process
        os.close(mine)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        warnings.simplefilter("ignore")

        def tell(*said: Any) -> None:
            content = pickle.dumps(said)
            os.write(theirs, len(content).to_bytes(4, "little") + content)

        code = _run(tell, function, arguments)
    finally:
        os._exit(code)


def _run(tell: Callable[..., None], function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Run as an interpreter does: the function, then the threads that are left, then what is registered for the end."""
    code = 0
    try:
        tell("returned", function(tell, *arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        tell("raised", traceback.format_exc())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _read(forks: list[Fork], seconds: float) -> None:
    """Read what *forks* tell within *seconds*."""
    waiting = [fork for fork in forks if not fork.ended]
    ready, _, _ = select.select([fork.pipe for fork in waiting], [], [], seconds)
    for one in waiting:
        if one.pipe in ready:
            length = one.pipe.read(4)
            if length is None or len(length) < 4:
                one.ended = True
                continue
            content, missing = b"", int.from_bytes(length, "little")
            while missing and (part := one.pipe.read(missing)):
                content, missing = content + part, missing - len(part)
            one.ended = bool(missing)
            if not missing:
                one.told.append(pickle.loads(content))


def until(forks: list[Fork], condition: Callable[[Fork], bool], seconds: float = _PATIENCE) -> bool:
    """Read what *forks* tell until *condition* holds for all of them, one has ended, or *seconds* are over."""
    end = time.monotonic() + seconds
    while not all(map(condition, forks)):
        left = end - time.monotonic()
        if left <= 0 or any(fork.ended for fork in forks):
            return all(map(condition, forks))
        _read(forks, left)
    return True


def listen(forks: list[Fork], seconds: float) -> None:
    """Read what *forks* tell for *seconds*."""
    until(forks, lambda fork: False, seconds)


def end(forks: list[Fork], number: int = signal.SIGKILL, grace: float = 0.0) -> None:
    """Send signal *number* to all *forks*, and kill those that are left after *grace* seconds."""
    for one in forks:
        one.kill(number)
    if grace:
        until(forks, lambda fork: fork.ended, grace)
        stop = time.monotonic() + grace
        while not all(fork.ended for fork in forks) and time.monotonic() < stop:
            _read(forks, stop - time.monotonic())
    for one in forks:
        one.kill(signal.SIGKILL)
        one.reap()


def call(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 1800.0) -> list[Any]:
    """Return what *function* returns on each of *world* forked ranks; raise RuntimeError with what one raised."""
    forks = fork(world, function, *arguments)
    while not all(one.ended for one in forks) and not any(_said(one, "raised") for one in forks):
        before = time.monotonic()
        _read(forks, seconds)
        seconds -= time.monotonic() - before
        if seconds <= 0:
            break
    end(forks)
    for one in forks:
        for what, *said in one.told:
            if what == "raised":
                raise RuntimeError(said[0])
    answers = [said[0] for one in forks for what, *said in one.told if what == "returned"]
    if len(answers) != world:
        raise RuntimeError(f"{world - len(answers)} of {world} ranks ended without an answer, or did not end")
    return answers


def _said(one: Fork, word: str) -> bool:
    return any(said[0] == word for said in one.told)
