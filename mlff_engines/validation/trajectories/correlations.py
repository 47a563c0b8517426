"""Motion in time: velocity autocorrelation, vibrational spectrum, mean-square displacement, diffusion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlff_engines.errors import DataError
from mlff_engines.structure import SYMBOLS, FloatArray
from mlff_engines.validation.trajectories.observables import Frames, needed

FIT = (0.1, 0.5)  # of the longest lag: later ones have too few origins, earlier ones are not diffusive
SI = 1e-5  # m²/s in 1 Å²/fs


def velocity_autocorrelation(frames: Frames, masses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """c(t) = Σ_i m_i <v_i(0)·v_i(t)> / Σ_i m_i <v_i²>, averaged over all origins.

    Args:
        frames: with velocities, evenly spaced in time.
        masses: amu, (N,).

    Returns:
        lags in fs and c without unit, c(0) = 1; up to half the length of the trajectory.

    Raises:
        DataError: no velocities, all at rest, or times not evenly spaced.
    """
    weighted = _weighted(frames, masses)
    total = len(frames)
    correlate = needed("scipy.signal").correlate
    c = sum(correlate(x, x, method="fft")[total - 1 :] for x in weighted.T) / np.arange(total, 0, -1)
    half = (total + 1) // 2
    return frames.interval * np.arange(half, dtype=float), c[:half] / c[0]


def vibrational_spectrum(
    frames: Frames, masses: FloatArray, resolution: float | None = None
) -> tuple[FloatArray, FloatArray]:
    """Where the kinetic energy vibrates: the power spectrum of the mass-weighted velocities, by Welch's method.

    The Fourier transform of the velocity autocorrelation (Thomas et al., Phys. Chem. Chem. Phys. 15, 6608 (2013),
    Eq. 4). Velocity Verlet with a time step h finds a frequency ω too high, at 2 arcsin(ω h/2)/h.

    Args:
        frames: with velocities, evenly spaced in time.
        masses: amu, (N,).
        resolution: cm⁻¹; by default, and at best, what the length of the trajectory allows.

    Returns:
        wavenumbers in cm⁻¹ and densities in cm, of integral 1.

    Raises:
        DataError: no velocities, all at rest, times not evenly spaced, or too short for the resolution.
    """
    weighted = _weighted(frames, masses)
    interval = frames.interval * 1e-15 * 100 * needed("scipy.constants").speed_of_light  # the way of light, cm
    length = len(frames) if resolution is None else round(1 / (resolution * interval))
    if not 8 <= length <= len(frames):
        raise DataError(
            f"a resolution of {resolution:g} cm⁻¹ takes {length} frames of {frames.interval:g} fs, from 8 to the "
            f"{len(frames)} there are; give another resolution or a longer trajectory"
            if resolution is not None
            else f"{len(frames)} frames are too few for a spectrum; give at least 8"
        )
    wavenumbers, density = needed("scipy.signal").welch(
        weighted, fs=1 / interval, window="hann", nperseg=length, detrend=False, axis=0
    )
    density = density.sum(axis=1)
    return wavenumbers, density / np.trapezoid(density, wavenumbers)


def unwrapped(frames: Frames) -> Frames:
    """The same trajectory, with no jumps across the cell: between frames each atom takes the nearest image's way."""
    if not frames.pbc.any():
        return frames
    inverse = np.linalg.pinv(frames.cell[frames.pbc])
    steps = np.diff(frames.positions, axis=0)
    jumps = np.cumsum(np.round(steps @ inverse), axis=0) @ frames.cell[frames.pbc]
    return replace(frames, positions=np.concatenate([frames.positions[:1], frames.positions[1:] - jumps]))


def mean_square_displacement(frames: Frames, number: int) -> tuple[FloatArray, FloatArray]:
    """<|r(t) - r(0)|²> of the atoms of one element over all origins, by MDAnalysis.

    Args:
        frames: evenly spaced in time, and so closely that no atom moves half a cell between two.
        number: atomic number.

    Returns:
        lags in fs and displacements in Å².

    Raises:
        DataError: no such atoms, or times not evenly spaced.
    """
    chosen = np.flatnonzero(frames.numbers == number)
    if not len(chosen):
        raise DataError(f"there is no {SYMBOLS[number]} in the trajectory")
    positions = unwrapped(frames).positions[:, chosen]
    positions = positions - positions.mean(axis=(0, 1))  # MDAnalysis holds float32
    analysis = needed("MDAnalysis")
    universe = analysis.Universe.empty(len(chosen), trajectory=True)
    universe.load_new(positions.astype(np.float32), dt=frames.interval)
    run = needed("MDAnalysis.analysis.msd").EinsteinMSD(universe, fft=False).run()
    return frames.interval * np.arange(len(frames), dtype=float), run.results.timeseries


def diffusion(frames: Frames, number: int, blocks: int = 4) -> tuple[float, float]:
    """Diffusion coefficient D = <|r(t) - r(0)|²> / (6 t) of one element, with its standard error.

    The slope of the mean-square displacement between `FIT` of the longest lag, in each of several blocks of time;
    finite size makes it smaller than that of bulk (Yeh and Hummer, J. Phys. Chem. B 108, 15873 (2004)).

    Returns:
        mean and standard error of the blocks, m²/s.

    Raises:
        DataError: no such atoms, times not evenly spaced, or fewer than 10 frames in a block.
    """
    size = len(frames) // blocks
    if blocks < 2 or size < 10:
        raise DataError(f"{len(frames)} frames in {blocks} blocks; give at least 2 blocks of 10 frames")
    continuous = unwrapped(frames)
    slopes = []
    for k in range(blocks):
        part = slice(k * size, (k + 1) * size)
        block = replace(continuous, positions=continuous.positions[part], times=frames.times[part], velocities=None)
        lags, displacement = mean_square_displacement(block, number)
        fitted = (lags >= FIT[0] * lags[-1]) & (lags <= FIT[1] * lags[-1])
        slopes.append(np.polyfit(lags[fitted], displacement[fitted], 1)[0] / 6 * SI)
    return float(np.mean(slopes)), float(np.std(slopes, ddof=1) / np.sqrt(blocks))


def _weighted(frames: Frames, masses: FloatArray) -> FloatArray:
    """Velocities times the square root of the mass, (T, 3N)."""
    if frames.velocities is None:
        raise DataError("the trajectory has no velocities: use the samples of the engine, or a format that has them")
    if not frames.velocities.any():
        raise DataError("all atoms are at rest: there is nothing to correlate")
    return (np.sqrt(masses)[:, None] * frames.velocities).reshape(len(frames), -1)
