"""Proposers of trials: Optuna, random search and grid; each a function of the events so far."""

from typing import Any

from ddpm.search.event_log import Status
from ddpm.search.space import Choice, Domain, Space


class OptunaProposer:
    """Optuna's TPE: ten random trials, then regions where good trials are denser than others.

    A stopped trial is reported as PRUNED, with the values of its rungs: TPE ranks it below every finished one, and
    below those stopped later. Ray Tune's OptunaSearch reports it as COMPLETE with its last value (Ray 2.60).
    """

    def __init__(self, space: Space, seed: int) -> None:
        import optuna  # a slow import, which the other searchers do not need

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        state = optuna.trial.TrialState
        self._states = {"finished": state.COMPLETE, "stopped": state.PRUNED, "failed": state.FAIL}
        self._space, self._trials = space, dict[int, Any]()

    def suggest(self, number: int) -> dict[str, Any] | None:
        trial = self._trials[number] = self.study.ask()
        return self._space.suggest(lambda key, domain: _ask(trial, key, domain))

    def evaluated(self, number: int, images_seen: int, value: float) -> None:
        self._trials[number].report(value, images_seen)

    def ended(self, number: int, status: Status, value: float | None) -> None:
        # For the others tell() takes no value; for a pruned one it reads the last reported value.
        reported = value if status == "finished" else None
        self.study.tell(self._trials[number], reported, self._states[status])


class ListProposer:
    """Trials independent of results: random ones, or a grid."""

    def __init__(self, space: Space, seed: int, grid_points: int | None) -> None:
        self._space, self._seed = space, seed
        self._grid = None if grid_points is None else space.grid(grid_points)

    def suggest(self, number: int) -> dict[str, Any] | None:
        if self._grid is None:
            return self._space.sample(self._seed, number)
        return self._grid[number] if number < len(self._grid) else None

    def evaluated(self, number: int, images_seen: int, value: float) -> None: ...

    def ended(self, number: int, status: Status, value: float | None) -> None: ...


def _ask(trial: Any, key: str, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(key, list(domain.values))
    if domain.is_int:
        return trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.is_log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.is_log)
