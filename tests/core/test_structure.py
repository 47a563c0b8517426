"""What a `Structure` refuses to hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlff_engines.errors import StructureError
from mlff_engines.structure import NUMBERS, SYMBOLS, Structure

WATER = {"numbers": np.array([8, 1, 1]), "positions": np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])}


def test_symbols() -> None:
    assert (len(SYMBOLS), SYMBOLS[1], SYMBOLS[54], SYMBOLS[118]) == (119, "H", "Xe", "Og")
    assert NUMBERS["Fe"] == 26


@pytest.mark.fault("S6")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_coordinate_that_is_no_number(value: float) -> None:
    positions = WATER["positions"].copy()
    positions[2, 1] = value
    with pytest.raises(StructureError, match=r"atom 2 \(H\) has a coordinate that is not finite.*1 such atom"):
        Structure(WATER["numbers"], positions)


@pytest.mark.fault("S7")
@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.zeros((3, 3)), [True, True, True]),
        (np.diag([5.0, 5.0, 0.0]), [True, True, True]),
        (np.array([[5.0, 0, 0], [10, 0, 0], [0, 0, 5]]), [True, True, False]),
        (np.array([[5.0, 0, 0], [0, 5, 0], [5, 5, 1e-9]]), [True, True, True]),
        (np.diag([np.nan, 5.0, 5.0]), [True, True, True]),
        (np.diag([np.inf, 5.0, 5.0]), [True, False, False]),
    ],
)
def test_singular_cell(cell: Any, pbc: Any) -> None:
    with pytest.raises(StructureError, match=r"cell is singular along its periodic axes.*switch pbc off"):
        Structure(**WATER, cell=cell, pbc=pbc)


@pytest.mark.fault("S9")
@pytest.mark.parametrize("cell", [np.zeros((3, 3)), np.ones((3, 3)), np.diag([5.0, 0, 0])])
def test_dummy_cell_is_fine_where_it_is_not_read(cell: Any) -> None:
    assert Structure(**WATER, cell=cell).volume is None
    assert Structure(**WATER, cell=np.diag([5.0, 0, 0]), pbc=[True, False, False]).volume is None


@pytest.mark.parametrize("cell", [np.diag([2.0, 3.0, 4.0]), np.diag([2.0, 3.0, -4.0])])
def test_volume(cell: Any) -> None:
    assert Structure(**WATER, cell=cell, pbc=True).volume == pytest.approx(24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.zeros((2, 3))}, r"got numbers \(3,\), positions \(2, 3\).*expected \(N,\), \(N, 3\)"),
        ({"positions": np.zeros((3, 2))}, r"positions \(3, 2\)"),
        ({"cell": np.zeros(3)}, r"cell \(3,\)"),
        ({"numbers": np.array([8, 0, 1])}, "atomic number 0 of atom 1; allowed: 1 to 118"),
        ({"numbers": np.array([8, 119, 1])}, "atomic number 119 of atom 1"),
    ],
)
def test_wrong_arrays(change: Any, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        Structure(**(WATER | change))


def test_any_layout_and_kind_of_array_is_taken() -> None:
    positions = np.asfortranarray(WATER["positions"].astype(np.float32))
    structure = Structure(WATER["numbers"].astype(np.int32), positions, pbc=False)
    assert structure.numbers.dtype == np.int64
    assert structure.positions.dtype == np.float64
    assert structure.positions.flags.c_contiguous
    assert structure.pbc.tolist() == [False] * 3
