"""A cluster that cannot be had is a line; Ray is not started here."""

import os

import pytest
import ray
from ddpm.utils.errors import UserError

from ddpm.cluster import ray_init


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            None,
            RuntimeError("Failed to start\n raylet"),
            "Ray did not start on this machine: Failed to start raylet; ",
        ),
        (None, TimeoutError(), "Ray did not start on this machine: TimeoutError; "),
        (
            "10.0.0.9:6379",
            ConnectionError("x" * 9999),
            "cluster at RAY_ADDRESS=10.0.0.9:6379 cannot be joined: xxx",
        ),
    ],
)
def test_ray_that_does_not_start_is_a_line(
    address: str | None, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    environment = dict(os.environ) | ({"RAY_ADDRESS": address} if address else {})
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError) as raised:
        ray_init.connect()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert raised.value.exit_code == 1
