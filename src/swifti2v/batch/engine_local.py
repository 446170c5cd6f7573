"""Workers as processes of this machine, each at the end of a pipe; a process that dies is seen at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from .words import Capacity, Heard, Lost, Outcome, Place, Ready, Task

STOP_SECONDS = 5.0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class LocalEngine:
    """The engine that needs nothing but Python.

    On Linux workers are forked from a server that has imported everything and computed nothing, so a new one is there
    at once; elsewhere each is a new interpreter.
    """

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self._context.set_forkserver_preload(["swifti2v.batch.preload"])
        self._workers: dict[int, _Worker] = {}

    def capacity(self) -> Capacity:
        import torch

        return Capacity(torch.get_num_threads(), torch.cuda.device_count(), torch.get_num_threads())

    def start(self, place: Place) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, place), name=f"worker-{place.number}", daemon=True)
        process.start()
        theirs.close()
        self._workers[place.number] = _Worker(process, ours)

    def send(self, worker: int, task: Task) -> None:
        try:
            self._workers[worker].pipe.send(task)
        except OSError:  # it has just died; heard() will say so
            return

    def heard(self, seconds: float) -> Iterable[Heard]:
        """Words first, deaths after: what a worker said before it died is still in its pipe."""
        pipes = {worker.pipe: number for number, worker in self._workers.items()}
        for pipe in wait(list(pipes), seconds):
            assert isinstance(pipe, Connection)
            yield from self._words(pipes[pipe], pipe)

    def stop(self, worker: int) -> None:
        """Asks, then kills; what the journal holds stays either way."""
        found = self._workers.pop(worker, None)
        if found is None:
            return
        found.process.terminate()
        found.process.join(STOP_SECONDS)
        if found.process.is_alive():
            found.process.kill()
            found.process.join()
        found.pipe.close()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.terminate()
        for number in list(self._workers):
            self.stop(number)

    def _words(self, number: int, pipe: Connection) -> Iterable[Heard]:
        try:
            yield Heard(number, pipe.recv())
        except (EOFError, OSError):  # the pipe ends with its process
            yield Heard(number, Lost(self._buried(number)))

    def _buried(self, number: int) -> str:
        """How a worker died, in words."""
        worker = self._workers.pop(number)
        worker.process.join(STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(pipe: Connection, place: Place) -> None:
    """A worker process: tasks in, events and outcomes out, until the pipe ends or it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    signal.signal(signal.SIGTERM, _interrupt)
    from .worker import Keeper, settle, work

    settle(place)
    keeper = Keeper(place)
    try:
        pipe.send(Ready(os.getpid()))
        while True:
            outcome: Outcome = work(pipe.recv(), place, keeper, pipe.send)
            pipe.send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent is gone, or wants us to be


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt
