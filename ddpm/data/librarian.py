"""Who directs the reading of a run: one process that stays, for one group of workers after the other.

Its own room because it is an actor that stands in for one of Ray's; what is read, and in which order, says stream.py.
"""

import threading
import uuid
from typing import Any, NamedTuple

import ray
from ray.data import DataIterator
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.iterator import stream_split_iterator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm.config import Config
from ddpm.data import stream
from ddpm.data.reading import DataSet


class Librarian:
    """The actor that directs the reading of a run, for one group of workers after the other.

    Ray Data starts a coordinator for every split, on the node of rank 0, and every restart of the workers would wait
    for that process to start. Here Ray's own coordinators live in one process that stays (Ray 2.60 knows no other).
    Each has its own number: what workers that are no more have left behind reaches none but theirs.
    """

    def __init__(self, verbose: bool) -> None:
        self._desks: dict[str, Any] = {}
        self._lock, self._coordinator = threading.Lock(), _plain(stream_split_iterator.SplitCoordinator)
        # Its `options` and `remote` are called in Ray's place.
        stream_split_iterator.SplitCoordinator = self  # type: ignore[misc, assignment]
        if not verbose:
            stream.hide_progress()

    def split(
        self, config: Config, data_set: DataSet, todo: list[stream.Task], images_seen: int, world_size: int
    ) -> list[DataIterator]:
        """`stream.split`; whatever was split before is given up."""
        with self._lock:
            for desk in self._desks.values():  # in a thread: it takes a moment until nothing is read any more
                threading.Thread(target=desk.shutdown_executor, daemon=True).start()
            for number in list(self._desks)[:-1]:  # the last one may be asked yet whether that was all
                self._desks.pop(number)._cur_epoch = None  # nobody waits there any more for others to come
            return stream.split(config, data_set, todo, images_seen, world_size)

    def call(self, number: str, method: str, *arguments: Any) -> Any:
        """A method of the coordinator of that number."""
        if (desk := self._desks.get(number)) is None:
            raise RuntimeError("the process that directed this reading has died")
        return getattr(desk, method)(*arguments)

    def options(self, **resources: Any) -> "Librarian":
        return self

    def remote(self, *arguments: Any) -> "_Desk":
        number = uuid.uuid4().hex
        self._desks[number] = self._coordinator(*arguments)
        return _Desk(ray.get_runtime_context().current_actor, number)


class _Desk:
    """Stands for the actor that Ray's iterators speak with."""

    def __init__(self, librarian: Any, number: str) -> None:
        for method in (
            "start_epoch",
            "get",
            "notify_split_finished",
            "stats",
            "get_dataset_tag",
            "get_dataset_context",
        ):
            setattr(self, method, _Method(librarian, number, method))


class _Method(NamedTuple):
    librarian: Any
    number: str
    method: str

    def remote(self, *arguments: Any) -> Any:
        return self.librarian.call.remote(self.number, self.method, *arguments)


def announce() -> None:
    """Let Ray's coordinator of all that ask for nodes begin: Ray Train's controller would, and wait for it (2.60)."""
    get_or_create_autoscaling_coordinator()


def employ(num_workers: int, verbose: bool = False) -> Any:
    """A new librarian, for at most so many workers, on this node: it lives as long as this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Each worker has a call or two under way, and those of groups that died may hang in theirs for a while.
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 16 + 8 * num_workers}
    return ray.remote(Librarian).options(scheduling_strategy=here, **options).remote(verbose)


def _plain(actor_class: Any) -> Any:
    """The class that was made an actor's."""
    return actor_class.__ray_metadata__.modified_class
