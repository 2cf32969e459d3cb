"""Training in this process, in plain torch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.runs import storage
from ddpm.runs.run_folder import RunFolder
from ddpm.training import loop
from ddpm.training.runtime import Runtime
from ddpm.training.state import State
from ddpm.training.store import RunStore


class Logged:
    """The values and warnings of a run."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.warnings: list[str] = []

    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        self.rows.setdefault(images_seen, {}).update(values)


@contextmanager
def finished(store: RunStore) -> Iterator[RunStore]:
    """A context at whose end everything is stored."""
    with ExitStack() as stack:
        stack.callback(store.close)
        stack.callback(store.flush)
        yield store


def fit(
    config: Config,
    data_set: DataSet,
    folder: Path,
    logged: Logged | None = None,
    runtime: Callable[..., Runtime] = Runtime,
) -> State:
    """Train in `folder`, from its newest checkpoint."""
    run = RunFolder(folder.name, storage.resolve(str(folder)), "")
    with finished(RunStore(config, run, data_set.rows.fingerprint)) as store:
        if logged is not None:
            store.metrics = logged.metrics  # type: ignore[method-assign]
            store.warn = logged.warnings.append
        return loop.train(config, runtime(config, data_set, data_set.held_out(), store))


def tensors(state: State) -> dict[str, torch.Tensor]:
    """All weights, averages and moments."""
    parts = (state.net.state_dict(), state.ema.state_dict(), state.optimizer_tensors())
    return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same tensors of a checkpoint's folder."""
    return {
        f"{i}.{name}": tensor
        for i, file in enumerate(("net", "ema", "optimizer"))
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys() and len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
