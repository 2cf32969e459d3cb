"""Plots of a search: settings and their results, likelihood against sample quality."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from matplotlib import pyplot
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial
from optuna.visualization.matplotlib import plot_parallel_coordinate

from ddpm.evaluation.ranking import Z
from ddpm.search.space import Domain
from ddpm.search.trials import Trial
from ddpm.utils.images import figure_png


def parallel(trials: Sequence[Trial], domains: Mapping[str, Domain]) -> bytes:
    """One line per trial over its settings, coloured by bits/dim: the best are dark. A PNG."""
    study = optuna.create_study()
    shown = [trial for trial in trials if trial.last and trial.repeats is None]
    distributions: dict[str, Any] = {_name(key): domain for key, domain in domains.items()}
    distributions["status"] = CategoricalDistribution(list(dict.fromkeys(trial.outcome for trial in shown)))
    for trial in shown:
        params = {_name(key): value for key, value in trial.changes.items()} | {"status": trial.outcome}
        own = {name: distributions[name] for name in params}
        study.add_trial(create_trial(params=params, distributions=own, value=trial.bits_per_dim))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an experimental function; an axis on which all trials are equal
        figure: Any = plot_parallel_coordinate(study, target_name="bits/dim").figure
    figure.set_size_inches(1.4 * len(domains) + 6, 4.5)
    figure.tight_layout()
    png = figure_png(figure)
    pyplot.close(figure)
    return png


def scatter(trials: Sequence[Trial]) -> bytes:
    """Likelihood against sample quality of the finalists, with intervals of 95 %. A PNG."""
    scored = [(trial, trial.last, trial.score) for trial in trials if trial.last and trial.score]
    figure = Figure((4.6, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    axes.set_xlabel("bits/dim", fontsize=8)
    axes.set_ylabel(scored[0][2].name, fontsize=8)
    axes.tick_params(labelsize=7)
    for trial, last, score in scored:
        axes.errorbar(
            last.bits_per_dim.value,
            score.value,
            Z * score.error,
            Z * last.bits_per_dim.error,
            marker="o",
            capsize=3,
            label=f"{trial.name} {trial.changes.get('schedule.kind', '')}",
        )
    axes.legend(fontsize=7, frameon=False)
    return figure_png(figure)


def _name(key: str) -> str:
    return key if len(key) <= 20 else key.rpartition(".")[2]  # Optuna cuts off more than 20 characters
