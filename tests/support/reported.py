"""Evaluation reports with made-up numbers."""

from dataclasses import replace
from typing import Any

from ddpm.config.tree import SampleConfig
from ddpm.evaluation.results import CheckpointResult, NearerShare, Report, SampledScores, Score

METRICS = tuple(f"{name}-pixels" for name in ("FID", "KID", "precision", "recall"))
TERMS = ("bits/dim", "bits/dim-prior", "bits/dim-kl", "bits/dim-decoder")


def drawn(i: int, steps: int = 50, own: bool = True, **sample: Any) -> SampledScores:
    scores = tuple(
        Score(name, 0.1234567 * (i + j + 1) / steps, 0.01 + j / 1000, 500, 90, 0.2 + j, 0.03, 400)
        for j, name in enumerate(METRICS)
    )
    return SampledScores(SampleConfig(sampler="ddim", num_sample_steps=steps, **sample), own, scores)


def nearer(low: float, n_real: int = 1000, space: str = "pixels") -> NearerShare:
    return NearerShare(
        name=f"nearer_than_held_out-{space}",
        value=low + 0.01234567,
        error=0.01,
        n=500,
        n_real=n_real,
        floor=0.01,
        floor_error=0.003,
        floor_n=500,
        low=low,
        high=low + 0.04,
        space=space,
        threshold=12.5,
        n_train=1500,
    )


def near(low: float, steps: int = 50, **changes: Any) -> SampledScores:
    """A sampling method's result with a memorisation score and its image."""
    return replace(drawn(1, steps), scores=(nearer(low, **changes),), nearest=f"PNG {low}".encode())


def result(i: int, *samplings: SampledScores, run: str = "a", **changes: Any) -> CheckpointResult:
    bits = tuple(Score(name, 4.5678901 - i / 10 + j, 0.05, 90) for j, name in enumerate(TERMS))
    folder = f"runs/{run}/checkpoint-{i}"
    sha256 = f"sha{i}"
    position = 1000 * i
    made = CheckpointResult(
        folder, sha256, run, f"key{run}", "ddpm", position, True, "measured", True, bits, samplings, 0
    )
    return replace(made, **changes)


def made(*results: CheckpointResult, grey_levels: int = 256) -> Report:
    settings = {"features": {"name": "pixels", "size": 64}, "data": {"grey_levels": grey_levels}}
    return Report(settings, results)
