"""What all figures share: a canvas of panels, colours along a range, a mean with its band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def canvas(rows: int, columns: int, *, width: float = 4.2, height: float = 3.4, **shared: Any) -> tuple[Any, Any]:
    """Return (figure, axes[rows][columns]), drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width * columns, height * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **shared)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def shades(count: int) -> list[Any]:
    """Return colours from light to dark."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.12 + 0.88 * i / max(1, count - 1)) for i in range(count)]


def band(axis: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: Any, **style: Any) -> None:
    """Draw the mean of curves over seeds, and a band of one standard deviation where there are several."""
    columns = list(zip(*curves, strict=True))
    mean = [fmean(column) for column in columns]
    axis.plot(x, mean, color=color, **style)
    if len(curves) > 1:
        spread = [stdev(column) for column in columns]
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def save(figure: Any, path: Path) -> None:
    """Write the figure as `path`, a PNG, and as a PDF beside it, which does not hold the time of its making."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    pyplot.close(figure)
