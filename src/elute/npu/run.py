"""Runs a graph of tasks on two threads, one a worker, in the order that a policy chooses.

Knows no device and no arithmetic: a task is a call of `work`. What a task finds depends on those
that it waits for, all of which have ended before it begins, and on no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from elute.npu.schedule import (
    Front,
    Graph,
    Policy,
    Schedule,
    Task,
    Times,
    Worker,
    lower_bound,
    task_seconds,
)


def run(
    graph: Graph,
    policy: Policy,
    times: Times,
    work: Callable[[Task], None],
    *,
    cancelled: Callable[[], bool] | None = None,
    crossing_s: float = 0.0,
) -> Schedule | None:
    """Returns when each task ran; None where it was cancelled, and then not all have run.

    times      what the policy believes of the tasks, need not be right; likewise crossing_s, which
               is part of what a task of the NPU takes here and is not added
    work       is called once for each task, by two threads at a time: for a task of the CPU, and
               for one of the NPU, which waits in it until the device is done
    cancelled  asked before each task

    An exception of `work` or `cancelled`, and one that the caller's thread is interrupted with,
    keeps both workers from their next task and is raised here when the tasks under way have ended.
    No thread outlives the call.
    """
    seconds = task_seconds(graph, times, crossing_s)
    shared = _Run(graph, Front(graph, seconds, policy), work, cancelled)
    threads = {
        worker: threading.Thread(target=shared.work_as, args=(worker,), name=f"elute-{worker}")
        for worker in Worker
    }
    try:
        for thread in threads.values():
            thread.start()
    except BaseException as error:  # no thread left to start, or Ctrl-C
        shared.stop(error)
    for worker, thread in threads.items():
        # Not join() at once: in CPython 3.11 one that Ctrl-C interrupts takes a running thread for
        # an ended one.
        while thread.ident is not None and worker not in shared.gone:
            try:
                shared.leaving[worker].acquire()
            except BaseException as error:
                shared.stop(error)
        if thread.ident is not None:
            thread.join()
    if shared.error is not None:
        raise shared.error
    if shared.front.n_left:
        return None
    starts, ends = tuple(shared.starts), tuple(shared.ends)
    taken_s = [end - start for start, end in zip(starts, ends, strict=True)]
    return Schedule(graph, starts, ends, crossing_s, lower_bound(graph, taken_s))


class _Run:
    """What both workers and the caller see. `changed` guards the front and the errors."""

    def __init__(
        self,
        graph: Graph,
        front: Front,
        work: Callable[[Task], None],
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self.front = front
        self.starts = [0.0] * len(graph.tasks)
        self.ends = [0.0] * len(graph.tasks)
        self.error: BaseException | None = None
        self.gone: set[Worker] = set()  # those that touch nothing here any more
        self.leaving = {worker: threading.Lock() for worker in Worker}  # held until it is gone
        for lock in self.leaving.values():
            lock.acquire()
        self._changed = threading.Condition()
        self._declined: dict[Worker, int] = {}  # what was left when it found nothing to do
        self._graph = graph
        self._work = work
        self._cancelled = cancelled
        self._stopped = False
        self._began = time.perf_counter()

    def stop(self, error: BaseException | None = None) -> None:
        """The first error is the one that is told."""
        with self._changed:
            self._stopped = True
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def work_as(self, worker: Worker) -> None:
        try:
            while (index := self._next(worker)) is not None:
                self.starts[index] = time.perf_counter() - self._began
                self._work(self._graph.tasks[index])
                self.ends[index] = time.perf_counter() - self._began
                with self._changed:
                    self.front.finish(worker)
                    self._changed.notify_all()
        except BaseException as error:
            self.stop(error)
        finally:
            self.gone.add(worker)
            self.leaving[worker].release()

    def _next(self, worker: Worker) -> int | None:
        """Waits for it; None: there is nothing more to do."""
        front = self.front
        with self._changed:
            while not self._stopped and front.n_left:
                # With the lock, so that the time of asking is nobody's task; it must be short.
                if self._cancelled is not None and self._cancelled():
                    self._stopped = True
                    self._changed.notify_all()
                    break
                index = front.take(worker)
                if index is not None:
                    return index
                self._declined[worker] = front.n_left
                both = all(self._declined.get(each) == front.n_left for each in Worker)
                assert front.running or not both, "a policy waits for nothing"
                self._changed.wait()
        return None
