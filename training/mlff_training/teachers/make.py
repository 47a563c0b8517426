"""Make a teacher: in this process, or in another environment at the end of a pipe."""

from __future__ import annotations

import os
from typing import Any

from mlff_engines.errors import TeacherError
from mlff_training.teachers import worker
from mlff_training.teachers.calculator import TeacherCalculator, build_error
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.remote import RemoteCalculator


class LocalCalculator(TeacherCalculator):
    """A teacher in this process."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        before = dict(os.environ)
        os.environ |= config.thread_limits  # read once, when a library is loaded; small systems crawl with many threads
        try:
            self._teacher = worker.build(config.spec.path, {**config.spec.options, **config.options})
        except Exception as error:
            raise build_error(config, worker.failure(error)) from error
        finally:
            for name in config.thread_limits:
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]

    def _evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return worker.evaluate(self._teacher, **request)
        except Exception as error:
            raise TeacherError(
                f"the teacher {self.config.name} failed on {self.atoms.get_chemical_formula()}: {error}"
            ) from error


def make_teacher(config: TeacherConfig) -> TeacherCalculator:
    """The teacher as an ASE calculator; with `python:` in a child process of that interpreter.

    Raises:
        TeacherError: if it is not installed (with the line that installs it) or cannot be made.
    """
    if config.python is None:
        return LocalCalculator(config)
    return RemoteCalculator(config)
