"""The load of this worker's machine, under the names that MLflow's pages gather as system metrics."""

import os
import platform
from contextlib import suppress
from pathlib import Path

import psutil

from ddpm.utils import devices

MEGABYTE = 1e6


def hardware() -> str:
    """Name of this worker's GPU, else the number of cores and the processor of its machine."""
    if (device := devices.default()) != devices.CPU:
        return devices.product_name(device)
    name = platform.machine()
    with suppress(OSError):  # not on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{psutil.cpu_count()} cores, {name}"


class SystemMetrics:
    """CPU, memory, disk, network, and the memory of this worker's GPU; network traffic since its creation."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call only starts the count
        self._network = psutil.net_io_counters()

    def sample(self) -> dict[str, float]:
        """Current usage, and the CPU's since the last sample: percentages 0..100, and megabytes (10^6 bytes)."""
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": psutil.disk_usage(os.sep).percent,
        }
        if network and self._network:  # none in a sandbox without interfaces
            values |= {
                "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
                "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
            }
        if accelerator := devices.memory():
            index, free, total = accelerator
            values |= {
                f"gpu_{index}_memory_usage_megabytes": (total - free) / MEGABYTE,
                f"gpu_{index}_memory_usage_percentage": (total - free) / total * 100,
            }
        return {f"system/{name}": float(value) for name, value in values.items()}
