"""The LAMMPS that calls a Python model: what its C interface tells, and the little that it does not.

`pair_style mliap unified` gives a model its atoms and pairs but neither units, masses, cell nor the neighbour settings,
and no handle to ask for them. The handle is found in memory: whatever object LAMMPS hands over leads to an instance
of LAMMPS' class `Pointers`, which holds the address L of the LAMMPS instance followed by L, L+8, L+16, ... (references
to its members, `pointers.h`). That pattern cannot be taken for anything else, and memory is read through
``/proc/self/mem``, where a wrong address is an error and not a crash. Everything else then goes through `library.h`,
except for the neighbour settings (`neighbor.h`), again recognised by their content.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlff_engines.errors import ConfigError, MLFFError
from mlff_engines.structure import FloatArray, IntArray

WORD = 8
# pointers.h and lammps.h list the same members in the same order
MEMBERS = ("memory", "error", "universe", "input", "atom", "update", "neighbor", "comm")
COMM_CUTOFF = "_ZN9LAMMPS_NS4Comm15get_comm_cutoffEv"  # double Comm::get_comm_cutoff()
LOGMESG = "_ZN9LAMMPS_NS5utils7logmesgEPNS_6LAMMPSERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
WARNING = 0  # library.h: LMP_ERROR_WARNING
MESSAGE = 2048  # bytes of an error message that travel between ranks


@dataclass(frozen=True)
class NeighborSettings:
    """What `neighbor` and `neigh_modify` set, and the age of the present list in steps. Lengths in LAMMPS' units."""

    every: int
    delay: int
    check: bool
    ago: int
    skin: float


class Host:
    """One LAMMPS instance.

    Args:
        handle: address of the instance.
        library: what `library.h` declares.
    """

    def __init__(self, handle: int, library: ctypes.CDLL) -> None:
        self.handle, self.library = ctypes.c_void_p(handle), library
        library.lammps_extract_global.restype = ctypes.c_void_p
        library.lammps_extract_atom.restype = ctypes.c_void_p
        library.lammps_extract_setting.restype = ctypes.c_int
        self.ranks, self.rank = self.setting("world_size"), self.setting("world_rank")
        self._mpi = _MPI(library, library.lammps_get_mpi_comm(self.handle)) if self.ranks > 1 else None

    @classmethod
    def behind(cls, given: object) -> Host:
        """The instance that `given`, an object of the ML-IAP coupling, belongs to.

        Raises:
            ConfigError: not found.
        """
        library = _library()
        handle = _find_handle(given)
        if library is None or handle is None:
            raise ConfigError(
                "cannot find the LAMMPS instance that calls this model, so its units and ghost atoms cannot be "
                "checked. That needs Linux and a LAMMPS built with BUILD_SHARED_LIBS: mlff lammps build makes one"
            )
        return cls(handle, library)

    def setting(self, name: str) -> int:
        """`lammps_extract_setting`."""
        return int(self.library.lammps_extract_setting(self.handle, name.encode()))

    @property
    def units(self) -> str:
        """Of the `units` command."""
        return ctypes.string_at(self.library.lammps_extract_global(self.handle, b"units")).decode()

    def constants(self, name: str, count: int) -> list[float]:
        """`count` doubles of `lammps_extract_global`."""
        address = self.library.lammps_extract_global(self.handle, name.encode())
        return list((ctypes.c_double * count).from_address(address)) if address else []

    def integers(self, name: str, count: int, kind: type[Any] = ctypes.c_int) -> list[int]:
        """`count` integers of `lammps_extract_global`."""
        address = self.library.lammps_extract_global(self.handle, name.encode())
        return list((kind * count).from_address(address)) if address else []

    @property
    def periodic(self) -> bool:
        """Whether any direction is."""
        return any(self.integers("periodicity", 3))

    @property
    def masses(self) -> list[float]:
        """Per type, amu; empty where atoms have masses of their own."""
        address = self.library.lammps_extract_atom(self.handle, b"mass")
        types = self.setting("ntypes")
        return list((ctypes.c_double * (types + 1)).from_address(address))[1:] if address else []

    def types(self, atoms: int) -> IntArray:
        """(atoms,) types, from 1, of owned atoms and ghosts."""
        address = self.library.lammps_extract_atom(self.handle, b"type")
        return np.array((ctypes.c_int * atoms).from_address(address), dtype=np.int64) if atoms else np.zeros(0, int)

    def tags(self, atoms: int) -> IntArray:
        """(atoms,) atom ids of owned atoms and ghosts."""
        kind = ctypes.c_int64 if self.setting("tagint") == WORD else ctypes.c_int
        address = self.library.lammps_extract_atom(self.handle, b"id")
        return np.array((kind * atoms).from_address(address), dtype=np.int64) if atoms else np.zeros(0, int)

    def positions(self, atoms: int) -> FloatArray:
        """(atoms, 3) of owned atoms and ghosts, a copy."""
        if not atoms:
            return np.zeros((0, 3))
        rows = self.library.lammps_extract_atom(self.handle, b"x")
        first = ctypes.c_void_p.from_address(rows).value
        assert first is not None
        return np.array((ctypes.c_double * (3 * atoms)).from_address(first)).reshape(atoms, 3)

    @property
    def ghost_cutoff(self) -> float | None:
        """How far ghost atoms reach beyond the domain; None where this LAMMPS does not tell."""
        function = getattr(self.library, COMM_CUTOFF, None)
        if function is None:
            return None
        function.restype = ctypes.c_double
        return float(function(ctypes.c_void_p(self._member("comm"))))

    @property
    def neighbors(self) -> NeighborSettings | None:
        """None where this LAMMPS keeps them elsewhere than expected."""
        address = self._member("neighbor")
        words = _read(address, 64 * WORD)
        doubles = struct.unpack(f"{len(words) // WORD}d", words)
        for k in range(5, len(doubles) - 3):
            skin, least, most, square = doubles[k : k + 4]
            if 0 <= skin < most and 0 <= least <= most and most * most == square:
                _, every, delay, check, ago, page, one, *_ = struct.unpack_from("10i", words, (k - 5) * WORD)
                if every >= 1 and delay >= 0 and check in (0, 1) and ago >= 0 and page >= 10 * one > 0:
                    return NeighborSettings(every, delay, bool(check), ago, skin)
        return None

    def say(self, text: str) -> None:
        """A line on LAMMPS' screen and in its log, of rank 0."""
        if self.rank:
            return
        function = getattr(self.library, LOGMESG, None)
        if function is None:
            self.library.lammps_error(self.handle, WARNING, text.encode())
            return
        data = ctypes.create_string_buffer(f"{text}\n".encode())
        string = _StdString(ctypes.addressof(data), len(data) - 1, len(data) - 1, 0)
        function(self.handle, ctypes.byref(string))

    def together(self, work: Callable[[], None]) -> None:
        """Do `work`; when it fails on any rank, every rank says so in the log and raises.

        LAMMPS waits for all ranks when Python raises on one: they must raise together.

        Raises:
            MLFFError: the failure of the first rank that failed.
        """
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # whatever it is, the other ranks are waiting
            failure = error
        message = None if failure is None else str(failure) or type(failure).__name__
        if message is not None and not isinstance(failure, MLFFError):
            message = f"{type(failure).__name__}: {message}"
        if self._mpi is not None:
            if message is not None:
                message = f"rank {self.rank}: {message}"
            message = self._mpi.first(self.rank, message)
        if message is not None:
            self.say(f"ERROR: pair_style mliap: {message}")
            if isinstance(failure, MLFFError):
                raise type(failure)(message) from None
            raise ConfigError(message) from failure

    def warn(self, message: str | None) -> None:
        """A warning in the log if any rank has one; every rank must call this."""
        if self._mpi is not None and self._mpi.known:
            message = self._mpi.first(self.rank, message and f"rank {self.rank}: {message}")
        if message is not None:
            self.say(f"WARNING: pair_style mliap: {message}")

    def total(self, value: int) -> int:
        """Sum over all ranks; under an MPI whose constants are not known, this rank's own."""
        return value if self._mpi is None else self._mpi.total(value)

    def abort(self, message: str) -> None:
        """End all ranks from one, where the others wait for what it cannot give. Nothing on one rank alone."""
        if self._mpi is not None:
            self._mpi.abort(f"rank {self.rank}: {message}")

    def _member(self, name: str) -> int:
        assert self.handle.value is not None
        return _word(self.handle.value + WORD * MEMBERS.index(name))


class _StdString(ctypes.Structure):
    """``std::string`` of libstdc++, its text kept elsewhere."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("capacity", ctypes.c_size_t),
        ("unused", ctypes.c_size_t),
    )


class _MPI:
    """Some calls, by the MPI that LAMMPS itself uses.

    Constants are those of the MPICH ABI (https://www.mpich.org/abi), which MPICH, Intel MPI, MVAPICH and Cray share.
    Under another MPI a rank that fails ends all of them.
    """

    INT, CHAR, MAX, SUM = 0x4C000405, 0x4C000101, 0x58000001, 0x58000003

    def __init__(self, library: ctypes.CDLL, communicator: int) -> None:
        self.library, self.communicator = library, communicator
        name, length = ctypes.create_string_buffer(8192), ctypes.c_int()
        library.MPI_Get_library_version(name, ctypes.byref(length))
        self.known = re.search(rb"MPICH|Intel\(R\) MPI|MVAPICH", name.value) is not None

    def first(self, rank: int, message: str | None) -> str | None:
        """The message of the first rank that has one, on all ranks."""
        if not self.known:
            if message is not None:
                self.abort(message)
            return None
        # the lowest rank wins: its negative is the largest
        worst = self._reduced(-rank if message is not None else -(2**31 - 1), self.MAX)
        if worst == -(2**31 - 1):
            return None
        text = (message or "").encode()[: MESSAGE - 1]
        buffer = ctypes.create_string_buffer(text, MESSAGE)
        self.library.MPI_Bcast(buffer, MESSAGE, self.CHAR, -worst, self.communicator)
        return buffer.value.decode(errors="replace")

    def total(self, value: int) -> int:
        """Sum over all ranks."""
        return self._reduced(value, self.SUM) if self.known else value

    def abort(self, message: str) -> None:
        """End all ranks."""
        os.write(2, f"ERROR: pair_style mliap: {message}\n".encode())
        self.library.MPI_Comm_f2c.restype = ctypes.c_void_p
        self.library.MPI_Abort(ctypes.c_void_p(self.library.MPI_Comm_f2c(self.communicator)), 1)

    def _reduced(self, value: int, operation: int) -> int:
        mine, all_ranks = ctypes.c_int(value), ctypes.c_int()
        self.library.MPI_Allreduce(
            ctypes.byref(mine), ctypes.byref(all_ranks), 1, self.INT, operation, self.communicator
        )
        return all_ranks.value


@functools.cache
def _library() -> ctypes.CDLL | None:
    """LAMMPS' own symbols: global when it is the program or was loaded so, else by the name it was loaded under."""
    names: list[str | None] = [None]
    maps = Path("/proc/self/maps")
    if maps.exists():
        names += sorted({line.split()[-1] for line in maps.read_text().splitlines() if "liblammps" in line})
    for name in names:
        library = ctypes.CDLL(name)
        if hasattr(library, "lammps_extract_setting"):
            return library
    return None


def _find_handle(given: object) -> int | None:
    """Address of the LAMMPS instance behind an object of the ML-IAP coupling."""
    size = object.__sizeof__(given)
    for (pointer,) in struct.iter_unpack("Q", _read(id(given), size - size % WORD)):
        block = _read(pointer, 128 * WORD)
        words = struct.unpack(f"{len(block) // WORD}Q", block[: len(block) // WORD * WORD])
        for k in range(len(words) - len(MEMBERS)):
            found: int = words[k]
            if found and words[k + 1 : k + 1 + len(MEMBERS)] == tuple(found + WORD * i for i in range(len(MEMBERS))):
                return found
    return None


def _read(address: int, size: int) -> bytes:
    """Memory of this process; nothing where there is none."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:  # noqa: PTH123 (unbuffered)
            return os.pread(memory.fileno(), size, address)
    except (OSError, OverflowError):
        return b""


def _word(address: int) -> int:
    block = _read(address, WORD)
    return int.from_bytes(block, "little") if len(block) == WORD else 0
