"""The processes that tests start."""

import signal
import sys
from pathlib import Path

import pytest
from support.processes import Background

WAITS = "import time; print('ready', flush=True); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_gets_signals_that_the_tests_ignore(number: signal.Signals, tmp_path: Path) -> None:
    """A shell starts `make test &` with SIGINT ignored, and `nohup make test` with SIGHUP ignored."""
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        with Background([sys.executable, "-c", WAITS], log=tmp_path / "log") as job:
            job.wait_for(lambda: job.output == "ready\n")
            job.process.send_signal(number)
            assert job.wait(60) == -number
    finally:
        signal.signal(number, handler)
