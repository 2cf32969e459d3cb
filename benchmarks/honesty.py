"""What a bound depends on besides the net: the number of timesteps, the variance of p, and whether it was learned.

    python benchmarks/honesty.py fewer runs/digits                  # one net, fewer and fewer of its timesteps
    python benchmarks/honesty.py search runs/honest                    # twelve trials, ranked by both bounds
    python benchmarks/honesty.py learned runs/fixed runs/learned       # bits/dim and KID of fixed, measured and learned

Each prints tables in Markdown; benchmarks/honesty.md holds them, with the commands that made the runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from harness import tables
from harness.arguments import read
from harness.rankings import agreement

from ddpm.build import build_objective, build_schedule
from ddpm.config.tree import BoundVariance
from ddpm.data.reading import DataSet
from ddpm.diffusion import likelihood
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.process import q_sample
from ddpm.diffusion.reverse import ReverseVariance, fixed_variance
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.diffusion.schedules import Schedule
from ddpm.diffusion.timesteps import respaced, uniform
from ddpm.evaluation import bits_per_dim, evaluate, inputs
from ddpm.evaluation.features import images_of
from ddpm.evaluation.inputs import Candidate
from ddpm.evaluation.rung import Evaluator
from ddpm.evaluation.settings import Settings
from ddpm.runs import run_folder, storage
from ddpm.runs.evaluations import Score
from ddpm.search.trials import Trials, best
from ddpm.utils import images
from ddpm.utils.generators import PhiloxGenerator
from ddpm.utils.seeding import Purpose

FIXED: tuple[ReverseVariance, ...] = ("beta", "beta_tilde", "measured")


@dataclass(frozen=True)
class Fewer:
    """The bound of one net at fewer and fewer of its timesteps."""

    run: tyro.conf.Positional[str]
    timesteps: tuple[int, ...] = (500, 300, 200, 100)


@dataclass(frozen=True)
class Search:
    """The trials of a search, ranked by the bound with beta_tilde and with the measured variance, and by KID."""

    run: tyro.conf.Positional[str]


@dataclass(frozen=True)
class Learned:
    """bits/dim and KID of fixed, measured and learned variances."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    num_images: int = 1000
    num_draws: int = 64
    num_sample_steps: tuple[int, ...] = (25, 100)


def data_sets(candidate: Candidate) -> tuple[DataSet, DataSet]:
    """The candidate's training split and its held-out split."""
    by = inputs.prepare_reference([candidate], Settings(num_images=20, features="pixels", num_train_images=0))
    return by.train, by.held_out


def bounds_of(candidate: Candidate, num_steps: int) -> dict[ReverseVariance, np.ndarray]:
    """The bound of the chain of `num_steps` of the net's timesteps: [images, (kl, decoder, all)] a variance."""
    net = candidate.net
    config = candidate.config
    objective = build_objective(candidate.config)
    timesteps = uniform(config.schedule.num_timesteps, num_steps)
    chain = respaced(build_schedule(config.schedule), timesteps)
    where = torch.tensor(timesteps[::-1])

    def denoise(x_t: torch.Tensor, k: torch.Tensor) -> Denoised:
        return objective.denoise(net, x_t, where[k], None)

    train, held_out = data_sets(candidate)
    measured_by, _ = errors_of(denoise, chain, train, bits_per_dim.MEASURED_IMAGES, 64, Purpose.MEASURE)
    errors, x_0 = errors_of(denoise, chain, held_out, held_out.rows.num_rows, num_steps, Purpose.LIKELIHOOD)
    noise = PerImageNoise([PhiloxGenerator(1, i) for i in range(len(x_0))], tuple(x_0.shape[1:]))  # type: ignore[arg-type]
    first = torch.zeros(len(x_0), dtype=torch.int64)
    x_0_hat = denoise(q_sample(chain.alpha_bar, x_0, first, noise()), first).x_0_hat.clamp(-1, 1)
    found = {}
    for variance in FIXED:
        table = fixed_variance(chain, variance, measured_by.mean(0))
        kl = likelihood.kl_of_errors(chain, errors, table).sum(1)
        decoder = likelihood.decoder_nll(x_0, x_0_hat, table[:1].log().expand(len(x_0)))
        total = kl + decoder + likelihood.prior_kl(chain, x_0)
        found[variance] = torch.stack([kl, decoder, total], 1).numpy()
    return found


def errors_of(
    denoise: Callable, chain: Schedule, data_set: DataSet, n: int, num_measured: int, purpose: Purpose
) -> tuple[torch.Tensor, torch.Tensor]:
    """The errors of x_0_hat of the first n images of a split, [n, T], and the images."""
    x_0 = images.to_model(torch.from_numpy(images_of(data_set, 0, n).image))
    noise = PerImageNoise([PhiloxGenerator(0, purpose, i) for i in range(n)], tuple(x_0.shape[1:]))  # type: ignore[arg-type]
    return likelihood.x_0_errors(denoise, chain, x_0, noise, num_measured=num_measured), x_0


def variance_table(run: str, timesteps: Sequence[int]) -> None:
    (candidate,) = inputs.read_checkpoints([run])
    T = candidate.config.schedule.num_timesteps
    table = {n: bounds_of(candidate, n) for n in timesteps if n <= T}
    rows = []
    for n, found in table.items():
        cells = []
        for variance in FIXED:
            kl, decoder, total = found[variance].mean(0)
            more = (found[variance] - table[max(table)][variance])[:, 2]
            change = ""
            if n != max(table):
                change = f" ({more.mean():+.3f} ± {more.std(ddof=1) / len(more) ** 0.5:.3f})"
            cells.append(f"{kl:.3f}, {decoder:.3f}, **{total:.3f}**{change}")
        rows.append([n, *cells])
    names = [f"timesteps of {T}", *(f"{v}: sum of KL, decoder, bits/dim" for v in FIXED)]
    print("\n".join(tables.table(names, rows)))


def search_table(run: str) -> None:
    place = storage.resolve(run)
    trials = best(Trials(place).all())
    newest = [run_folder.checkpoints(place.child(trial.name))[-1].uri for trial in trials]
    candidates = inputs.read_checkpoints(newest)
    train, held_out = data_sets(candidates[0])
    bits: dict[str, np.ndarray] = {}
    for variance in ("beta_tilde", "measured"):
        evaluator = Evaluator(train, held_out, held_out.rows.num_rows, variance=variance)  # type: ignore[arg-type]
        found = [evaluator.evaluate(net, net.state["images_seen"]) for net in candidates]
        bits[variance] = np.array([evaluation.bits for evaluation in found])
    kid = np.array([trial.score.value for trial in trials if trial.score])
    columns: dict[str, np.ndarray] = {
        "bits/dim, beta_tilde": bits["beta_tilde"].mean(1),
        "bits/dim, measured": bits["measured"].mean(1),
        "KID, dpmpp_2m-20": kid,
        "KID, dpmpp_2m-10": in_ten_steps(newest),
    }
    ranks = {name: v.argsort().argsort() + 1 for name, v in columns.items()}
    rows: list[list[object]] = []
    for i, trial in enumerate(trials):
        cells = [cell for name in columns for cell in (f"{columns[name][i]:.4f}", ranks[name][i])]
        changes = trial.changes
        rows.append([trial.name, changes["schedule.kind"], changes["schedule.num_timesteps"], *cells])
    ranked = [cell for name in columns for cell in (name, "rank")]
    print("\n".join(tables.table(["trial", "kind", "T", *ranked], rows)), end="\n\n")
    T = np.array([trial.changes["schedule.num_timesteps"] for trial in trials])
    others = {name: columns[name] for name in list(columns)[2:]} | {"T": T}
    rows = [
        [name, *(f"{agreement(columns[name], other).spearman:+.2f}" for other in others.values())]
        for name in list(columns)[:2]
    ]
    print("\n".join(tables.table(["Spearman's rho", *others], rows)))


def in_ten_steps(uris: Sequence[str]) -> np.ndarray:
    """KID of all with ten steps of dpmpp_2m."""
    settings = Settings(
        num_images=500, sampler="dpmpp_2m", num_sample_steps=10, num_draws=2, num_train_images=0
    )
    report = evaluate.evaluate(inputs.read_checkpoints(uris), settings)
    return np.array([kid_of(v.drawn.scores).value for v in report.results])


def kid_of(scores: Sequence[Score]) -> Score:
    return next(score for score in scores if score.name.startswith("KID"))


def learned_table(chosen: Learned) -> None:
    names = ["run", "images seen", "variance", "bits/dim", "KL", "decoder"]
    rows: list[list[object]] = []
    for candidate in inputs.read_checkpoints(chosen.runs):
        learned = candidate.config.objective.variance == "learned"
        for variance in ("beta_tilde", "measured", *(["learned"] if learned else [])):
            terms = terms_of(candidate, variance, chosen)  # type: ignore[arg-type]
            bits = bits_per_dim.bound_score(terms)
            _, kl, decoder = terms.mean(0)
            if variance == "measured":  # it is the bound's alone
                kids = [""] * len(chosen.num_sample_steps)
            else:
                kids = [kid_of_ddpm(candidate, variance, steps, chosen) for steps in chosen.num_sample_steps]
            bound = [f"{bits.value:.4f} ± {bits.error:.4f}", f"{kl:.4f}", f"{decoder:.4f}"]
            seen = f"{candidate.state['images_seen']:,}"
            rows.append([candidate.run, seen, variance, *bound, *kids])
            print(*rows[-1], flush=True)
    print("\n".join(tables.table([*names, *(f"KID, ddpm-{n}" for n in chosen.num_sample_steps)], rows)))


def terms_of(candidate: Candidate, variance: BoundVariance, chosen: Learned) -> np.ndarray:
    """The bound's terms of held-out images, [images, (prior, kl, decoder)]."""
    train, held_out = data_sets(candidate)
    errors = bits_per_dim.measure_errors(
        candidate, images_of(train, 0, bits_per_dim.MEASURED_IMAGES), variance
    )
    num_images = min(chosen.num_images, held_out.rows.num_rows)
    terms = []
    for start in range(0, num_images, bits_per_dim.PIECE_IMAGES):
        batch = images_of(held_out, start, min(start + bits_per_dim.PIECE_IMAGES, num_images))
        terms.append(bits_per_dim.bound_terms(candidate, errors, batch, start, chosen.num_draws))
    return np.concatenate(terms)


def kid_of_ddpm(candidate: Candidate, variance: str, steps: int, chosen: Learned) -> str:
    """KID of `steps` steps of ddpm with a variance."""
    settings = Settings(
        num_images=chosen.num_images,
        sampler="ddpm",
        num_sample_steps=steps,
        variance=variance,  # type: ignore[arg-type]
        num_train_images=0,
    )
    (result,) = evaluate.evaluate([candidate], settings, bounds=False).results
    kid = kid_of(result.drawn.scores)
    return f"{kid.value:.4f} ± {kid.error:.4f}"


def main() -> None:
    match read(
        Fewer | Search | Learned, __doc__, timesteps=(4, 2), num_images=20, num_draws=2, num_sample_steps=(5,)
    ):
        case Fewer(run, timesteps):
            variance_table(run, timesteps)
        case Search(run):
            search_table(run)
        case Learned() as chosen:
            learned_table(chosen)


if __name__ == "__main__":
    main()
