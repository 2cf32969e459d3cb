"""Plots of a search: settings and their results, likelihood against sample quality, denoising at equal noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ddpm.evaluation.ranking import Z
from ddpm.search.event_log import Metric, Trial
from ddpm.utils.images import figure_png

MANY = 8
"""A numeric axis is logarithmic if its values span more than this factor."""
MISSING = -0.12
"""Height at which a line passes an axis without a value."""


def parallel(trials: Sequence[Trial], metric: Metric) -> bytes:
    """One line per trial over its settings, coloured by the metric: the best are dark. A PNG."""
    shown = sorted((t for t in trials if t.last), key=lambda t: t.value(metric), reverse=True)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.changes))
    names = [*keys, metric]
    rows = [{**trial.changes, metric: trial.value(metric)} for trial in shown]
    figure, axes = _figure(max(1.5 * len(names), 4), 3.6)
    axes.axis("off")
    places = [_places([row.get(name) for row in rows]) for name in names]
    values = np.array([row[metric] for row in rows], float)
    # By rank: one trial that failed to learn would leave all others the same colour.
    order = values.argsort().argsort() / max(len(values) - 1, 1)
    for i in range(len(rows)):
        heights = [place[i] for place, _ in places]
        done = len(keys) > 0 and shown[i].status == "finished"
        axes.plot(
            range(len(names)),
            heights,
            color=colormaps["viridis"](0.95 * order[i]),
            linewidth=1.6 if done else 0.8,
            linestyle="-" if done else ":",
        )
    for x, (name, (_, ticks)) in enumerate(zip(names, places, strict=True)):
        axes.plot([x, x], [0, 1], color="0.6", linewidth=1, zorder=0)
        axes.text(x, 1.06, name.replace(".", ".\n"), ha="center", va="bottom", fontsize=8)
        for height, text in ticks:
            axes.text(x + 0.03, height, text, fontsize=7, va="center", color="0.25")
    axes.set_xlim(-0.2, len(names) - 0.5)
    axes.set_ylim(MISSING - 0.05, 1.3)
    axes.text(
        -0.15,
        MISSING - 0.04,
        "dotted: stopped early; below: not used by this schedule",
        fontsize=7,
        color="0.4",
    )
    return figure_png(figure)


def scatter(trials: Sequence[Trial]) -> bytes:
    """Likelihood against sample quality of the finalists, with intervals of 95 %. A PNG."""
    figure, axes = _figure(4.6, 3.6)
    for i, trial in enumerate(trial for trial in trials if trial.drawn and trial.last):
        assert trial.last is not None
        axes.errorbar(
            trial.last.bits_per_dim,
            trial.drawn["value"],
            Z * trial.drawn["error"],
            Z * trial.last.bits_per_dim_error,
            marker="o",
            capsize=3,
            color=f"C{i % 10}",
            label=f"{trial.name} {trial.changes.get('schedule.kind', '')}",
        )
        axes.set_ylabel(trial.drawn["name"], fontsize=8)
    axes.set_xlabel("bits/dim", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    return figure_png(figure)


def denoising(log_snr: NDArray[np.float64], curves: Mapping[str, NDArray[np.float64]]) -> bytes:
    """The error of x_0_hat over log SNR, of several nets at equal noise. A PNG.

    Args:
        log_snr: [L].
        curves: by legend entry, [N, L], the squared error of each image.
    """
    figure, axes = _figure(4.6, 3.6)
    for label, errors in curves.items():
        mean, error = errors.mean(0), errors.std(0, ddof=1) / len(errors) ** 0.5
        (line,) = axes.plot(log_snr, mean, linewidth=1.2, label=label)
        axes.fill_between(log_snr, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("log SNR, noise to the right", fontsize=8)
    axes.set_ylabel("held-out error of x_0_hat", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    return figure_png(figure)


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] of values on one axis, and its ticks."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, str | bool) for value in known):
        words = sorted(set(map(str, known)))
        at = {word: i / max(len(words) - 1, 1) for i, word in enumerate(words)}
        return [MISSING if v is None else at[str(v)] for v in values], [(at[word], word) for word in words]
    if not known:
        return [MISSING] * len(values), []
    low, high = min(known), max(known)
    is_log = low > 0 and high / low > MANY
    scale = Normalize(*(np.log([low, high]) if is_log else (low, high)))

    def height(value: float) -> float:
        return 0.5 if high == low else float(scale(np.log(value) if is_log else value))

    ticks = [(height(value), f"{value:.3g}") for value in sorted({low, high})]
    return [MISSING if value is None else height(value) for value in values], ticks


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()
