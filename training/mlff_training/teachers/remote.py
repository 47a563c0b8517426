"""A teacher in the interpreter of another environment, spoken to over a pipe."""

from __future__ import annotations

import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mlff_engines.errors import TeacherError
from mlff_training.teachers import worker
from mlff_training.teachers.calculator import TeacherCalculator, build_error
from mlff_training.teachers.config import TeacherConfig

_LOG_LINES = 12


class TeacherLost(TeacherError):
    """The teacher's process died, hung or was closed: nothing is known about the structure it was working on."""


class RemoteCalculator(TeacherCalculator):
    """A teacher in a child process, restarted at the next call when it died; `close` or garbage collection kills it.

    Raises:
        TeacherError: if the teacher cannot be made there.
        TeacherLost: if the process dies or exceeds `config.timeout`.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        self._python = config.python or Path(sys.executable)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._busy = threading.RLock()  # held by the thread that talks to the child
        self._start()

    def close(self) -> None:
        """Kill the child, also while another thread waits for its answer; that and later calls raise `TeacherLost`."""
        self._closed = True
        process = self._process
        if process is not None:
            _signal(process)
        # the waiting thread sees the end of the stream; closed under its hands, the stream would never tell it
        with self._busy:
            self._kill()

    def _start(self) -> None:
        # the other environment is its own: our module paths mean nothing there
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= self.config.thread_limits
        try:
            process = subprocess.Popen(
                [str(self._python), worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us to handle; and its own children die with it
            )
        except OSError as error:
            raise TeacherError(
                f"cannot start {self._python} for the teacher {self.config.name}: {error.strerror}. "
                "`python:` must be the path of a Python interpreter that has the teacher and ASE installed"
            ) from None
        assert process.stderr is not None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._drain = threading.Thread(target=_drain, args=(process.stderr, self._log), daemon=True)
        self._drain.start()
        self._process = process
        self._finalizer = weakref.finalize(self, _kill, process)
        if self._closed:  # meanwhile, by another thread that saw no process to kill
            self._kill()
            raise TeacherLost(f"the teacher {self.config.name} was closed")
        spec = self.config.spec
        same = self.config.python is None or Path(sys.executable) == self.config.python
        request = {
            "build": spec.path,
            "options": {**spec.options, **self.config.options},
            "sys_path": [entry for entry in sys.path if entry] if same else [],
        }
        answer = self._ask(request, f"loading the teacher {self.config.name}")
        if "error" in answer:
            self._kill()
            raise build_error(self.config, answer, self._last_lines())

    def _evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        what = f"the teacher {self.config.name}, {self.atoms.get_chemical_formula()}"
        with self._busy:
            if self._closed:
                raise TeacherLost(f"{what}: it was closed")
            if self._process is None:
                self._start()
            answer = self._ask(request, what)
        if "error" in answer:
            raise TeacherError(f"{what}: {answer['error']}")
        results: dict[str, Any] = answer["results"]
        return results

    def _ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """Send a request and wait for its answer; whatever interrupts this exchange ends the child."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            worker.send(process.stdin, request)  # type: ignore[arg-type]
            deadline = time.monotonic() + self.config.timeout
            (size,) = struct.unpack(">Q", _read(process.stdout, 8, deadline))
            return worker.decode(_read(process.stdout, size, deadline))
        except TimeoutError:
            self._kill()
            raise TeacherLost(
                f"{what}: no answer within {self.config.timeout:g} s; raise `timeout:` in the teacher's section if "
                f"it needs longer{self._last_lines()}"
            ) from None
        except (EOFError, BrokenPipeError, ValueError, struct.error):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)  # its own exit code tells more than our SIGKILL
            code = self._kill()
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise TeacherLost(f"{what}: its process died ({reason}){self._last_lines()}") from None
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> int:
        """End the child, if it has not ended by itself, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._finalizer()
        self._drain.join(timeout=1.0)
        return process.returncode

    def _last_lines(self) -> str:
        lines = [line for line in self._log if line.strip()]
        return "; its last words:\n  " + "\n  ".join(lines) if lines else ""


def _drain(stream: IO[bytes], log: deque[str]) -> None:
    with stream:
        for line in stream:
            log.append(line.decode(errors="replace").rstrip()[:500])


def _signal(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    _signal(process)
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(BrokenPipeError):
            stream.close()


def _read(stream: IO[bytes], size: int, deadline: float) -> bytes:
    """Exactly `size` bytes; EOFError at the end of the stream, TimeoutError after the deadline."""
    descriptor, parts = stream.fileno(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(parts) < size:
            if not selector.select(max(deadline - time.monotonic(), 0.0)):
                raise TimeoutError
            part = os.read(descriptor, size - len(parts))
            if not part:
                raise EOFError
            parts += part
    return bytes(parts)
