"""Evaluation reports with made-up numbers."""

from dataclasses import replace
from typing import Any

from ddpm.config.tree import SampleConfig
from ddpm.runs.evaluations import CheckpointResult, NearerShare, Report, SampledScores, Score

METRICS = tuple(f"{name}-pixels" for name in ("FID", "KID", "precision", "recall"))


def drawn(i: int, steps: int = 50, own: bool = True, **sample: Any) -> SampledScores:
    scores = tuple(
        Score(name, 0.1234567 * (i + j + 1) / steps, 0.01 + j / 1000, 500, 90, 0.2 + j, 0.03)
        for j, name in enumerate(METRICS)
    )
    return SampledScores(SampleConfig(sampler="ddim", num_sample_steps=steps, **sample), own, scores)


def nearer(low: float) -> NearerShare:
    return NearerShare(
        name="nearer_than_held_out-pixels",
        value=low + 0.01234567,
        error=0.01,
        n=500,
        n_real=1000,
        floor=0.01,
        floor_error=0.003,
        low=low,
        high=low + 0.04,
    )


def near(low: float, steps: int = 50) -> SampledScores:
    """A sampling method's result with a memorisation score and its image."""
    return replace(drawn(1, steps), scores=(nearer(low),), nearest=f"PNG {low}".encode())


def result(i: int, sampled: SampledScores | None = None, run: str = "a", **changes: Any) -> CheckpointResult:
    made = CheckpointResult(
        checkpoint=f"runs/{run}/checkpoint-{i}",
        weights_sha256=f"sha{i}",
        run=run,
        run_key=f"key{run}",
        images_seen=1000 * i,
        saw_this_data=True,
        bits=Score("bits/dim", 4.5678901 - i / 10, 0.05, 90),
        drawn=drawn(i) if sampled is None else sampled,
    )
    return replace(made, **changes)


def made(*results: CheckpointResult) -> Report:
    settings = {"features": {"name": "pixels", "size": 64}, "data": {}}
    return Report(settings, results)
