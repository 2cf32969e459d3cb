"""One trial of a search, in its driver: `cluster.fit`, and each of its checkpoints that counts, judged beside it.

Its own room because this is a process of its own between the search and the trial's workers. Training never waits for
the jury. What was judged lies in the run's folder: whoever tries again goes on from there.
"""

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from ddpm import runs
from ddpm.config import Config, UserError
from ddpm.data.reading import DataSet
from ddpm.jury import Judged, Jury
from ddpm.patience import patiently
from ddpm.runs import Run
from ddpm.storage import Location
from ddpm.training import board as boards
from ddpm.training import checkpoint, cluster, placement
from ddpm.trials import Rung

POLL_INTERVAL_S = 0.25
CLOSING_S = 90.0
"""How long workers that are no longer wanted may take to leave."""
JUDGED = "judged"
"""Folder of a run: what was found of its checkpoints."""
PLACE = "place"
"""File of a run: the id of the placement group of its workers."""


class Attempt:
    """A trial under way.

    Args:
        config: of the trial's run.
        data_set: the split to train on.
        rungs: images seen at which it is judged, ascending; there are checkpoints there.
        jury: who judges.
        parent_run_id: the search's MLflow run.
        verbose: let Ray's own messages through.
    """

    def __init__(
        self,
        config: Config,
        data_set: DataSet,
        rungs: list[int],
        jury: Jury,
        parent_run_id: str | None = None,
        verbose: bool = False,
    ) -> None:
        assert config.run.name is not None, "a search names its trials"
        self._config, self._data_set, self._jury = config, data_set, jury
        self._parent_run_id, self._verbose = parent_run_id, verbose
        self._run: Run = runs.open_run(config.run.name, config.run.storage)
        self._left = list(rungs)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._wanted = True
        self._began_at: float | None = None
        self._place = ""
        self._images_seen, self._training_s = -1, 0.0

    def next(self) -> Rung:
        """What is found at the next rung, as soon as it is; after the last, training is over.

        Raises:
            UserError: training failed, or what it made is of no use.
        """
        images_seen = self._left.pop(0)
        file = self._run.location.child(JUDGED).child(f"{images_seen:012d}.json")
        known = self._patiently(file)
        if known is not None:
            return Judged.from_json(known, file.uri).rung(self._training_s)
        if self._thread is None:
            self._thread = threading.Thread(target=self._fit, name="ddpm-attempt", daemon=True)
            self._thread.start()
        judged = self._jury.judge(self._checkpoint(images_seen))
        patiently(lambda: file.write(judged.to_json().encode()), where=file.uri, timeout_s=self._timeout_s)
        if not self._left:
            self._thread.join()
            self._check()
        return judged.rung(self._training_s)

    def close(self) -> None:
        """Let the workers leave, if they are still there, and wait until they have."""
        self._wanted = False
        if self._thread is not None:
            self._thread.join(CLOSING_S)

    @property
    def _timeout_s(self) -> float:
        return self._config.run.storage_timeout_s

    def _checkpoint(self, images_seen: int) -> str:
        """URI of the checkpoint after so many images, as soon as it is there."""
        place = self._run.location.child(checkpoint.name_at(images_seen))
        while True:
            over = self._thread is None or not self._thread.is_alive()
            if self._patiently(place.child(checkpoint.CHECKSUMS)) is not None:
                return place.uri
            self._check()
            if over:
                raise UserError(f"{place.uri} is not there, though training is over; somebody deleted it")
            time.sleep(POLL_INTERVAL_S)

    def _patiently(self, file: Location) -> bytes | None:
        """Its content; None: it is not there."""
        try:
            return patiently(file.read, where=file.uri, timeout_s=self._timeout_s)
        except FileNotFoundError:
            return None

    def _fit(self) -> None:
        try:
            left = self._patiently(self._run.location.child(PLACE))
            if left is not None:  # by a driver of this trial that was killed
                placement.free(left.decode())
            cluster.fit(
                self._config,
                self._data_set,
                verbose=self._verbose,
                goes_on=self._goes_on,
                parent_run_id=self._parent_run_id,
            )
        except BaseException as error:  # handed to who waits, whatever it is
            self._error = error

    def _goes_on(self, notes: Mapping[str, Any]) -> bool:
        place, progress = notes.get(boards.PLACE), notes.get(boards.PROGRESS)
        if place is not None and place.id.hex() != self._place:
            self._place = place.id.hex()
            with contextlib.suppress(OSError):  # training can do without
                self._run.location.child(PLACE).write(self._place.encode())
        if progress is not None and progress.images_seen != self._images_seen:
            self._images_seen, now = progress.images_seen, time.monotonic()
            self._began_at = self._began_at or now
            self._training_s = now - self._began_at
        return self._wanted

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
