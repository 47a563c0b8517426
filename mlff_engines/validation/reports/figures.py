"""Plots of a report as SVG, all in one style."""

from __future__ import annotations

import io
import re
import textwrap
from typing import Any

import numpy as np

from mlff_engines.structure import BoolArray, FloatArray
from mlff_engines.validation.result import Curve, Plot
from mlff_engines.validation.trajectories.observables import needed

# told apart without colour vision, and by their dashes: Wong, Nature Methods 8, 441 (2011)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
SIZE = (4.6, 3.1)  # inches
FEW = 5  # curves; the legend of more stands below the axes
MANY = 1500  # points; more are drawn as a picture inside the SVG
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "mlff-engines",
}


def svg(plot: Plot, prefix: str = "") -> str:
    """`plot` as an <svg> element to stand in a page, or "" when it has no point to show.

    Args:
        plot: what to draw; points that are not finite, or not positive on a logarithmic axis, are left out.
        prefix: for the ids within, which a page may have once only.
    """
    curves = [curve for curve in plot.curves if _shown(curve, plot.scale).any()]
    if not curves:
        return ""
    matplotlib, figures = needed("matplotlib"), needed("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        if plot.scale in ("log", "log-log"):
            axes.set_yscale("log")
        if plot.scale == "log-log":
            axes.set_xscale("log")
        for k, curve in enumerate(curves):
            _draw(axes, curve, plot.scale, k)
        _plain_ticks(axes)
        violins = [curve for curve in curves if curve.style == "violin"]
        if violins:
            axes.set_xticks([curve.x[0] for curve in violins], [curve.label for curve in violins], rotation=90)
            axes.grid(visible=False, axis="x")
        axes.set_title(_wrapped(plot.title, 46), loc="left")
        axes.set(xlabel=_wrapped(plot.x, 60), ylabel=_wrapped(plot.y, 40))
        crowded = len(curves) > 1 and sum(len(curve.x) for curve in curves) >= MANY  # no free place inside
        if violins:
            pass  # named below the axis
        elif len(curves) > FEW or crowded:
            columns = 3 if len(curves) > FEW else len(curves)
            legend = figure.legend(loc="outside lower center", ncols=columns)
            lines = sum(text.get_text().count("\n") + 1.5 for text in legend.texts) / columns
            figure.set_figheight(SIZE[1] + 0.14 * lines)
        elif len(curves) > 1 or curves[0].label:
            axes.legend(loc="best" if sum(len(curve.x) for curve in curves) < MANY else "upper right")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, dpi=130)
    found = text.getvalue()
    found = found[found.index("<svg") :]
    return re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[0] + prefix, found)


def _draw(axes: Any, curve: Curve, scale: str, k: int) -> None:
    shown = _shown(curve, scale)
    x, y = (np.asarray(values, dtype=float)[shown] for values in (curve.x, curve.y))
    colour, label = COLOURS[k % len(COLOURS)], _wrapped(curve.label, 28)
    many = len(x) > MANY
    if curve.style == "violin":
        _violin(axes, float(x[0]), y, colour)
        return
    if curve.error is not None:
        error = np.abs(np.nan_to_num(np.asarray(curve.error, dtype=float)[shown], posinf=0.0, neginf=0.0))
        low, high = y - error, y + error
        if scale != "linear":
            low = np.where(low > 0, low, 0.1 * y)  # a band that reaches below zero
    if curve.style == "points":
        marker = {"ls": "none", "marker": MARKERS[k % len(MARKERS)], "color": colour, "alpha": 0.6, "label": label}
        marker |= {"ms": 2 if many else 4, "zorder": 3}  # above the lines
        if curve.error is None:
            axes.plot(x, y, rasterized=many, mec="none", **marker)
        else:
            axes.errorbar(x, y, np.stack([y - low, high - y]), capsize=2, elinewidth=0.8, **marker)
        return
    line = {"color": colour, "ls": DASHES[k % len(DASHES)], "label": label, "rasterized": len(x) > 20 * MANY}
    axes.plot(x, y, drawstyle="steps-mid" if curve.style == "steps" else "default", **line)
    if curve.error is not None:
        step = "mid" if curve.style == "steps" else None
        axes.fill_between(x, low, high, color=colour, alpha=0.22, lw=0, step=step)


def _violin(axes: Any, x: float, y: FloatArray, colour: str) -> None:
    """The density of `y`, and over it median, quartiles and whiskers; a density of few or equal numbers shows none."""
    if len(y) > 2 and np.ptp(y) > 0:
        for body in axes.violinplot([y], [x], widths=0.9, showextrema=False)["bodies"]:
            body.set(facecolor=colour, alpha=0.3)
    line = {"color": colour}
    axes.boxplot([y], positions=[x], widths=0.35, manage_ticks=False, boxprops=line, whiskerprops=line, capprops=line,
                 medianprops={"color": "black"}, flierprops={"marker": ".", "ms": 3, "mec": colour})  # fmt: skip


def _plain_ticks(axes: Any) -> None:
    """0.2 and not 2 × 10⁻¹ on logarithmic axes over less than two powers of ten."""
    ticker = needed("matplotlib.ticker")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and 1e-4 < low < high < min(1e4, 100 * low):
            axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_locator(ticker.NullLocator())
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _shown(curve: Curve, scale: str) -> BoolArray:
    """Which points can be drawn."""
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    shown: BoolArray = np.isfinite(x) & np.isfinite(y)
    if scale != "linear":
        shown &= y > 0
    if scale == "log-log":
        shown &= x > 0
    return shown


def _wrapped(text: str, width: int) -> str:
    """In lines of `width` characters, and as it stands: "$" opens no formula."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def band(label: str, x: FloatArray, replicas: FloatArray) -> Curve:
    """Mean of replicas (R, bins) with its standard error as the band; no band for one."""
    mean = replicas.mean(axis=0)
    error = replicas.std(axis=0, ddof=1) / np.sqrt(len(replicas)) if len(replicas) > 1 else None
    return Curve(label, x.tolist(), mean.tolist(), None if error is None else error.tolist())
