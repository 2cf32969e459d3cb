"""Links to MLflow's pages, and the description of a run there."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddpm.config.tree import Config
from ddpm.runs.run_folder import RunStatus

WORKFLOW = "workflowType=machine_learning"
"""Part of a link that shows MLflow's pages as model training; else they follow a switch that each browser remembers
(3.17)."""
NOTE_TAG = "mlflow.note.content"
NOTE_END = "\n\n*Written by the run; another text in its place stays.*"
GRID = "samples.png"
"""Name of the newest grid as an artifact."""
LAST_GRID = "samples_last"
"""Key of the last grid among the images."""
LOCAL_UI = "http://127.0.0.1:5000"


@dataclass(frozen=True)
class Described:
    """What the description of a run contains."""

    tags: Mapping[str, str]
    config: Config
    status: RunStatus
    images_seen: int
    metrics: Mapping[str, float]
    """The newest value of each."""
    run_id: str
    folder: str
    """URI of the run's folder."""


def link(uri: str, experiment_id: str | None, run_id: str | None) -> str:
    """The page of a run on the server at `uri`."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{WORKFLOW}"


def experiment_link(uri: str, experiment_id: str) -> str:
    """The page of an experiment's runs on the server at `uri`."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?{WORKFLOW}"


def ui_command(database: Path) -> str:
    """The command that serves MLflow's pages of a SQLite file at LOCAL_UI."""
    if database == Path("mlflow.db").absolute():
        return "mlflow ui"
    return f"mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}"


def description(facts: Described) -> str:
    """The description of a run in Markdown."""
    tags = facts.tags
    config = facts.config
    what = f"**{tags['preset']}**"
    if tags["changed"] != "nothing":
        what += f", {tags['changed']}"
    schedule = f"{config.schedule.kind} schedule of {config.schedule.num_timesteps} steps"
    what += f": predicts {config.objective.predict}, {schedule}."
    found = [
        f"{facts.status.text.capitalize()} at {facts.images_seen:,} of {config.train.total_images:,} images"
    ]
    found += _scores(facts.metrics)
    lines = [what, "; ".join(found) + "."]
    if "mlflow.loggedImages" in tags:
        lines.append(f"![samples](get-artifact?path={GRID}&run_uuid={facts.run_id})")
    if "command" in tags:
        lines.append(f"Resume: `{tags['command']}`")
    if "checkpoint" in tags:
        lines.append(f"Sample: `ddpm sample {facts.folder}`")
    return "\n\n".join(lines) + NOTE_END


def _scores(metrics: Mapping[str, float]) -> list[str]:
    """Bits/dim and KID with their errors; those of an evaluation replace those of training."""
    names = [name for name in sorted(metrics) if re.fullmatch(r"eval/KID-\w+", name)]
    if "eval/bits_per_dim" in metrics:
        names.insert(0, "eval/bits_per_dim")
    elif "held_out/bits_per_dim" in metrics:
        names.insert(0, "held_out/bits_per_dim")
    scores = []
    for name in names:
        group, _, score = name.partition("/")
        error = metrics.get(f"{group}_error/{score}")
        plus_minus = "" if error is None else f" ± {error:.4f}"
        scores.append(f"{score.replace('bits_per_dim', 'bits/dim')} {metrics[name]:.4f}{plus_minus}")
    return scores
