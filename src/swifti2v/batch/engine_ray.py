"""Workers as Ray actors, on this machine or on a cluster whose machines share the clips' folders.

An actor is never restarted by Ray: the scheduler starts another one, as it does for every engine.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from ..core import Event, UsageError
from .words import Capacity, Heard, Lost, Outcome, Place, Ready, Task

STORE_BYTES = 100 * 2**20  # events are small


class Actor:
    """A worker inside Ray. The clip is made in one thread of its own while events leave by another."""

    def __init__(self, place: Place) -> None:
        from .worker import Keeper, settle

        settle(place)
        self._place, self._keeper = place, Keeper(place)

    def ready(self) -> Ready:
        return Ready(os.getpid())

    def work(self, task: Task) -> Iterator[Event | Outcome]:
        """A task's events, and its outcome as the last."""
        from .worker import work

        words: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            try:
                words.put(work(task, self._place, self._keeper, words.put))
            finally:
                words.put(None)

        thread = threading.Thread(target=run)
        thread.start()
        while (word := words.get()) is not None:
            yield word  # not from an iterator: Ray sends to the generator itself
        thread.join()


class RayEngine:
    """``address`` None: a Ray of this process's own, on this machine, gone when it is closed."""

    def __init__(self, address: str | None) -> None:
        """Raises UsageError if Ray is not installed or not to be reached."""
        try:
            import ray
        except ImportError:
            raise UsageError('--engine ray needs Ray: pip install "swifti2v[ray]", or use --engine local') from None
        self._ray: Any = ray
        local: dict[str, Any] = (
            {} if address is not None else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        )
        try:
            self._ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"cannot use Ray at {address or 'this machine'}: {error}") from None
        self._actors: dict[int, Any] = {}
        self._awaited: dict[Any, int] = {}

    def capacity(self) -> Capacity:
        """All machines together; a worker fits the smallest of them, so that none is left waiting for a larger one."""
        there = self._ray.cluster_resources()
        machines = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        smallest = min((cpus for cpus in machines if cpus > 0), default=1)
        return Capacity(int(there.get("CPU", 1)), int(there.get("GPU", 0)), smallest)

    def start(self, place: Place) -> None:
        gpus = 1 if (place.device or "").startswith("cuda") else 0
        options = {"num_cpus": 1 if gpus else place.threads or 1, "num_gpus": gpus, "max_restarts": 0}
        actor = self._ray.remote(Actor).options(**options).remote(place)
        self._actors[place.number] = actor
        self._awaited[actor.ready.remote()] = place.number

    def send(self, worker: int, task: Task) -> None:
        words = self._actors[worker].work.options(num_returns="streaming").remote(task)
        self._awaited[words] = worker

    def heard(self, seconds: float) -> Iterable[Heard]:
        if not self._awaited:
            return
        ready, _ = self._ray.wait(list(self._awaited), timeout=seconds)
        for promise in ready:
            worker = self._awaited[promise]
            try:
                yield from self._words(promise, worker)
            except self._ray.exceptions.RayError as error:
                self.stop(worker)  # it may be half alive
                lines = str(error).strip().splitlines() or [type(error).__name__]
                died = isinstance(error, self._ray.exceptions.RayActorError)
                yield Heard(worker, Lost(lines[0 if died else -1][:200]))

    def stop(self, worker: int) -> None:
        self._awaited = {promise: number for promise, number in self._awaited.items() if number != worker}
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._ray.kill(actor)

    def close(self) -> None:
        for worker in list(self._actors):
            self.stop(worker)
        self._ray.shutdown()

    def _words(self, promise: Any, worker: int) -> Iterator[Heard]:
        if isinstance(promise, self._ray.ObjectRef):
            del self._awaited[promise]
            yield Heard(worker, self._ray.get(promise))
            return
        try:
            item = next(promise)
        except StopIteration:  # a bug in the worker: it ended without an outcome
            self.stop(worker)
            yield Heard(worker, Lost("it ended without a word; see Ray's logs"))
            return
        word = self._ray.get(item)
        if isinstance(word, Outcome):
            del self._awaited[promise]
        yield Heard(worker, word)
