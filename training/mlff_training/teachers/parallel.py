"""Many teacher tasks on any `concurrent.futures.Executor`; by default threads that each drive a process of their own.

A teacher in a child process keeps its cores whatever the GIL does, is limited to its threads, can be killed, and needs
no ``if __name__ == "__main__"`` in the user's script. An executor of the user's (processes, a cluster) runs the same
tasks with the teacher inside the worker.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlff_training.teachers.calculator import TeacherCalculator
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.make import make_teacher

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_mine = threading.local()


def teacher_here(config: TeacherConfig) -> TeacherCalculator:
    """The teacher of this worker (process and thread): made at its first task, then reused."""
    key = (config.digest, config.python)
    if getattr(_mine, "key", None) != key:
        if hasattr(_mine, "teacher"):
            _mine.teacher.close()
        _mine.teacher = make_teacher(config)
        _mine.key = key
        getattr(_mine, "opened", []).append(_mine.teacher)
    teacher: TeacherCalculator = _mine.teacher
    return teacher


@contextmanager
def workers_for(
    executor: Executor | None, workers: int, teacher: TeacherConfig
) -> Iterator[tuple[Executor, TeacherConfig]]:
    """The executor to use and the teacher as its workers shall make it; an executor made here is also ended here."""
    if executor is not None:
        yield executor, teacher
        return
    opened: list[TeacherCalculator] = []
    own = ThreadPoolExecutor(workers, "teacher", initializer=_remember, initargs=(opened,))
    try:
        yield own, teacher.model_copy(update={"python": teacher.python or Path(sys.executable)})
    finally:
        own.shutdown(wait=False, cancel_futures=True)
        for calculator in opened:  # before waiting: a task under way fails at once, a long computation ends
            calculator.close()
        own.shutdown(wait=True)


def _remember(opened: list[TeacherCalculator]) -> None:
    _mine.opened = opened


def as_done(
    executor: Executor, function: Callable[[Task], Answer], tasks: Sequence[Task]
) -> Iterator[list[tuple[int, Answer]]]:
    """Run `function` on every task; yield (task number, answer) as they finish, all that are finished at a time.

    The first exception of a task is raised here. When the caller stops early, tasks not yet started are cancelled.
    """
    finished: queue.SimpleQueue[tuple[int, Future[Answer]]] = queue.SimpleQueue()
    futures: list[Future[Answer]] = []
    try:
        for number, task in enumerate(tasks):
            future = executor.submit(function, task)
            futures.append(future)
            future.add_done_callback(lambda done, number=number: finished.put((number, done)))  # type: ignore[misc]
        left = len(futures)
        while left:
            batch = [finished.get()]
            while not finished.empty():
                batch.append(finished.get())
            left -= len(batch)
            yield [(number, future.result()) for number, future in batch]
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def progress_bar(description: str, total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar; call what it yields with the number of further things done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
