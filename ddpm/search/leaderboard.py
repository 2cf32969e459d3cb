"""The leaderboard of a search: KID of the finalists, and ranks with ties; results.py shows it.

There are two rankings, since likelihood and sample quality may disagree. A trial is one net, so its ranks exclude the
spread between seeds; the rank of a configuration needs several trainings.

Axes: K trainings of a configuration, M held-out images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm.build import build_schedule
from ddpm.config.json import override
from ddpm.evaluation import evaluate, inputs
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.ranking import Rank, configuration_ranks, paired_ranks, ranks
from ddpm.evaluation.rung import RANKING, REPORTING
from ddpm.evaluation.settings import Settings
from ddpm.runs.evaluations import Score
from ddpm.runs.run_folder import RunStatus
from ddpm.search.config import Arguments
from ddpm.search.trials import Trial, Trials, best

SAMPLER = "dpmpp_2m"
STEPS = 20
"""The sampler of finalists: fast, and the same for all. A trial of fewer timesteps takes one step per timestep."""
LEFTOVER = 0.5
"""A trial with sqrt(D alpha_bar_T) above this is flagged.

By this much the mean of an image of D numbers stands out of the noise of x_T. Samples start without it, so that means
from N(m, s^2) come out up to m s sqrt(D alpha_bar_T) too small: at 0.5, for N(0.6, 0.1^2), by 0.03, four grey levels.
The linear schedule of Ho et al. 2020 has 0.05 at 8x8 in grey, 0.35 at 32x32 in colour, 0.70 at 64x64, 2.8 at 256x256.
"""


@dataclass(frozen=True)
class Row:
    """A trial's line in the table."""

    trial: Trial
    leftover: float
    """sqrt(D alpha_bar_T)."""
    by_bits: Rank | None
    """Rank of this net among the search's own with the most images seen; None: it has fewer, failed, or repeats one."""
    by_kid: Rank | None
    """Rank of this net among those whose KID is known, by the search's feature net."""
    bits: NDArray[np.float64] | None
    """[K, M]: bits/dim of the trainings of its configuration, its own first; None where by_bits is."""
    by_trainings: Rank | None
    """Rank of its configuration among those trained several times."""

    @property
    def is_flagged(self) -> bool:
        return self.leftover > LEFTOVER

    @property
    def mean(self) -> Estimate | None:
        """Mean bits/dim of several trainings, on the images that rank."""
        return self._estimate(RANKING, 0) if self.by_trainings else None

    @property
    def reported(self) -> Estimate | None:
        """Mean bits/dim on the reporting split, of the trainings after the search, if there are any."""
        return self._estimate(REPORTING, 1 if self.by_trainings else 0)

    def _estimate(self, images: slice, first: int) -> Estimate | None:
        """Mean bits/dim of the trainings from `first` on; the error includes the spread of all trainings."""
        if self.bits is None:
            return None
        chosen = self.bits[first:, images]
        variance = chosen.mean(0).var(ddof=1) / chosen.shape[1] + self.spread**2 / len(chosen)
        return Estimate(float(chosen.mean()), float(variance**0.5))

    @property
    def spread(self) -> float:
        """Standard deviation between the trainings; 0: there is only one."""
        if self.bits is None or len(self.bits) < 2:
            return 0.0
        return float(self.bits.mean(1).std(ddof=1))


def score_finalists(arguments: Arguments, trials: Trials) -> None:
    """Compute KID of the best few trials, and store it in their folders; known values are not computed again."""
    todo: dict[int, list[Trial]] = {}
    for trial in best(trials.all())[: arguments.finalists]:
        if _score(trials, trial) is None:
            todo.setdefault(num_sample_steps(trials, trial), []).append(trial)
    for num_steps, same_steps in todo.items():
        settings = Settings(
            num_images=arguments.drawn_images,
            features=arguments.features,
            sampler=SAMPLER,
            num_sample_steps=num_steps,
            num_train_images=0,
            seed=arguments.seed,
        )
        candidates = inputs.read_checkpoints([trials.folder.child(trial.name).uri for trial in same_steps])
        report = evaluate.evaluate(candidates, settings, bounds=False)
        for trial, result in zip(same_steps, report.results, strict=True):
            kid = next(score for score in result.drawn.scores if score.name.startswith("KID"))
            trials.score(trial.name, kid)


def ranked(trials: Trials) -> list[Row]:
    """All trials: those trained several times by their mean bits/dim, others by bits/dim, then by images seen."""
    everything = trials.all()
    order = best(everything)
    bits = dict[str, NDArray[np.float64]]()
    mean = dict[str, float]()
    for own in order:
        trainings = [own]
        trainings += [
            trial for trial in everything if trial.repeats == own.name and trial.status == RunStatus.FINISHED
        ]
        bits[own.name] = np.array([trial.last.bits for trial in trainings if trial.last])
        mean[own.name] = float(np.mean([trial.bits_per_dim for trial in trainings]))
    several = {name: each[:, RANKING] for name, each in bits.items() if len(each) > 1}
    order.sort(key=lambda trial: (trial.name not in several, mean[trial.name]))
    rest = [trial for trial in everything if trial.name not in bits]
    rest.sort(key=lambda trial: (-trial.images_seen, trial.bits_per_dim))

    by_bits = dict[str, Rank]()
    if bits:
        by_bits = _by_name(bits, paired_ranks([each[0, RANKING] for each in bits.values()]))
    by_kid = _ranks_by_kid(order, trials)
    by_trainings = _by_name(several, configuration_ranks(list(several.values())))
    return [
        Row(
            trial=trial,
            leftover=_leftover(trials, trial),
            by_bits=by_bits.get(trial.name),
            by_kid=by_kid.get(trial.name),
            bits=bits.get(trial.name),
            by_trainings=by_trainings.get(trial.name),
        )
        for trial in order + rest
    ]


def _by_name(names: Iterable[str], own_ranks: Iterable[Rank]) -> dict[str, Rank]:
    return dict(zip(names, own_ranks, strict=True))


def _ranks_by_kid(order: Sequence[Trial], trials: Trials) -> dict[str, Rank]:
    """The rank by KID of each trial whose KID is known."""
    scores = dict[str, Score]()
    for trial in order:
        score = _score(trials, trial)
        if score is not None:
            scores[trial.name] = score
    values = [score.value for score in scores.values()]
    errors = [score.error for score in scores.values()]
    return _by_name(scores, ranks(values, errors))


def _score(trials: Trials, trial: Trial) -> Score | None:
    """The trial's KID, if it is as the newest command asks: an earlier one may have had another feature net."""
    score = trial.score
    if score is None or (score.name, score.n) != (trials.file.kid, trials.file.kid_images):
        return None
    return score


def num_sample_steps(trials: Trials, trial: Trial) -> int:
    """The number of steps in which a finalist is sampled."""
    return min(STEPS, override(trials.config, trial.changes).schedule.num_timesteps)


def _leftover(trials: Trials, trial: Trial) -> float:
    """sqrt(D alpha_bar_T) of the trial's config."""
    config = override(trials.config, trial.changes)
    return float((config.model.num_dims * build_schedule(config.schedule).alpha_bar[-1]).sqrt())
