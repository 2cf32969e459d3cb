"""Tested: on emulated AWS, with a real Ray node that is drained (tests/infra/test_aws_cluster.py). Not tested on AWS.

Tells Ray that AWS takes this spot machine back: python notice.py, beside Ray on every worker of cluster.yaml.
AWS announces it two minutes before, in the machine's metadata. Ray then gives the node no more work; a run stores a
checkpoint of the current step and continues on other machines (docs/faults.md). The command `ray drain-node` is made
for this, and hidden (Ray 2.60): if it is missing, the machine is lost like any other that fails.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
POLL_S = 5
TAKEN_BACK = Path(__file__).with_name("taken-back")
"""With this file cluster.yaml does not start Ray here again, when the drained node has ended."""


def metadata(path: str, method: str = "GET", **headers: str) -> str:
    """The answer of the metadata service; OSError: it has none."""
    named = {f"X-aws-ec2-metadata-{name.replace('_', '-')}": value for name, value in headers.items()}
    request = urllib.request.Request(f"{METADATA}/latest/{path}", method=method, headers=named)
    with urllib.request.urlopen(request, timeout=POLL_S) as answer:
        return str(answer.read().decode())


def seconds_left() -> int | None:
    """Seconds until AWS takes the machine back; None: that is not announced."""
    with contextlib.suppress(OSError, HTTPException):  # 404: nothing is announced
        token = metadata("api/token", "PUT", token_ttl_seconds="60")
        at = datetime.fromisoformat(
            json.loads(metadata("meta-data/spot/instance-action", token=token))["time"]
        )
        return max(1, int((at - datetime.now(UTC)).total_seconds()))
    return None


def main() -> int:
    with Path(__file__).with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it runs already: Ray was started again, and this with it
            return 0
        while (left := seconds_left()) is None:
            time.sleep(POLL_S)
        TAKEN_BACK.touch()
        import ray

        ray.init("auto", log_to_driver=False)
        here = ray.get_runtime_context()
        words = ["ray", "drain-node", "--address", here.gcs_address, "--node-id", here.get_node_id()]
        ray.shutdown()  # the node may end as soon as it is drained
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message", "AWS takes this machine back"]
        words += ["--deadline-remaining-seconds", str(left)]
        code = subprocess.call(words)
        print("Ray was not told" if code else "Ray was told", flush=True)
        return code


if __name__ == "__main__":
    sys.exit(main())
