"""System metrics have the values of this machine, and sampling them is cheap."""

import socket

import psutil
import torch

from ddpm.training.system_metrics import SystemMetrics


def test_a_sample_has_cpu_memory_and_disk_usage() -> None:
    values = SystemMetrics().sample()
    assert all(name.startswith("system/") for name in values)
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(values)
    assert torch.cuda.is_initialized() or not [name for name in values if "gpu" in name]
    for name, value in values.items():
        assert 0 <= value <= (100 if name.endswith("percentage") else float("inf")), name
    total = psutil.virtual_memory().total / 1e6
    share = values["system/system_memory_usage_megabytes"] / total * 100
    assert abs(share - values["system/system_memory_usage_percentage"]) < 1e-6
    assert (
        abs(values["system/disk_usage_percentage"] - psutil.disk_usage("/").percent) < 5
    )  # others write, too


def test_network_traffic_is_counted_from_the_start() -> None:
    system = SystemMetrics()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            for _ in range(20):
                client.sendall(b"x" * 100_000)
                received = 0
                while received < 100_000:
                    received += len(accepted.recv(1 << 20))
    values = system.sample()
    for name in ("system/network_receive_megabytes", "system/network_transmit_megabytes"):
        assert 2 <= values[name] < 2_000, "two megabytes went through the loopback interface"
