"""A journal of finished work: one line per record, on disk before it counts, readable after any kind of death."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlff_engines.errors import DataError
from mlff_training.teachers import worker


class Journal:
    """Records (dicts of plain values and arrays, each with a `key`), appended and never changed.

    A line is the CRC-32 of its JSON, a blank, the JSON. A torn last line (the process or machine died while writing)
    is cut off; a damaged one elsewhere is passed over with a warning: that work is redone.

    Raises:
        DataError: if another process is writing the same journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise DataError(f"another run is writing {path}; wait for it, or give this one another output") from None
        self.records = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        records: dict[str, dict[str, Any]] = {}
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)
        damaged = 0
        for line in data[:whole].splitlines():
            crc, _, text = line.partition(b" ")
            if crc == _crc(text):
                record = worker.decode(text)
                records[record["key"]] = record
            else:
                damaged += 1
        if damaged:
            warnings.warn(f"{self.path}: {damaged} damaged record(s) passed over; they are computed anew", stacklevel=3)
        return records

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the records and wait until the disk has them."""
        lines = bytearray()
        for record in records:
            text = json.dumps(record, default=worker.encode).encode()
            lines += _crc(text) + b" " + text + b"\n"
            self.records[record["key"]] = record
        view = memoryview(lines)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)  # and with it the lock


def _crc(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
