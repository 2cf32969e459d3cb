"""infra/prometheus and infra/grafana, checked by Debian's Prometheus: the files, and a run on a real cluster."""

import json
import re
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from support import servers
from support.launched import cluster_file
from support.processes import REPO, Job, members, paused

FOLDER = REPO / "infra/prometheus"
DASHBOARD = json.loads((REPO / "infra/grafana/dashboards/ddpm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
WITHOUT_GPU = {"GPU", "MFU"}
"""Panels that are empty for a run on CPUs."""
INTERVAL_S = 4
"""The default of Ray and Prometheus is 10."""
ENDLESS = """--schedule.num-timesteps 100 --model.base-width 8 --model.norm-groups 4 --train.total-images 100000000
    --train.batch-size 64 --train.micro-batch-size 32 --train.log-every-images 1024
    --train.checkpoint-every-images 4096 --train.sample-every-images 0 --sample.num-images 1
    --sample.num-sample-steps 1 --run.name watched --run.storage runs""".split()


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing; `apt-get install prometheus` brings it")
    return path


def promtool(*words: str | Path) -> str:
    """Run promtool, which must find no error; returns its output."""
    done = subprocess.run([tool("promtool"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expressions() -> Iterator[tuple[str, str]]:
    """Title and PromQL of every target of the dashboard, with all runs selected."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$run", ".*")


def test_the_configuration_is_valid_and_alerts_fire_as_expected() -> None:
    promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", FOLDER / "alerts.yml")
    promtool("test", "rules", REPO / "tests/infra/alerts_test.yml")


def test_every_panel_has_a_valid_query(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": expr} for i, (_, expr) in enumerate(expressions())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_the_dashboard_is_complete() -> None:
    """Panels have unique IDs and positions, and use the provisioned data source."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = Counter(
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    )
    assert max(cells.values()) == 1 and max(x for x, _ in cells) < 24
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "run"}
    sources = [part["datasource"] for panel in PANELS for part in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_both_programs_listen_on_loopback_and_find_their_files() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    mounted = dict(volume.split(":")[1::-1] for service in services.values() for volume in service["volumes"])
    places = {there: FOLDER / here for there, here in mounted.items() if here.startswith(".")}
    assert all(folder.is_dir() for folder in places.values())
    assert (places["/etc/prometheus"] / "prometheus.yml").is_file()
    provisioning = places["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090" and source["isDefault"]
    ours, rays = yaml.safe_load((provisioning / "dashboards/dashboards.yaml").read_text())["providers"]
    assert (places[ours["options"]["path"]] / "ddpm.json").is_file()
    assert rays["options"]["path"].startswith("/tmp/ray/") and "/tmp/ray" in mounted


@pytest.mark.parametrize("name", ["cluster.yaml", "infra/onprem/cluster.yaml"])
def test_a_head_starts_both_if_the_lines_are_uncommented(name: str) -> None:
    text, changed = re.subn(r"^( +)#(.*) # METRICS$", r"\1\2", (REPO / name).read_text(), flags=re.MULTILINE)
    assert changed == 4
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    plain = cluster_file(name)
    added = dict(config["file_mounts"].items() - plain["file_mounts"].items())
    assert all((REPO / folder).is_dir() for folder in added.values())
    *before, docker, start = config["head_start_ray_commands"]
    assert before == plain["head_start_ray_commands"] and docker.startswith("docker compose version || ")
    (compose,) = re.findall(r"--file (\S+)", start)
    there = next(folder for folder in added if compose.startswith(f"{folder}/"))
    assert (REPO / added[there] / compose.removeprefix(f"{there}/")).is_file()


class Prometheus(servers.Server):
    """Debian's Prometheus with the repository's files, but a shorter scrape interval."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        (port,) = servers.free_ports(1)
        self.uri = f"http://{servers.LOOPBACK}:{port}"
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text().replace("/tmp/ray", str(ray_folder)))
        config["global"] = {"scrape_interval": f"{INTERVAL_S}s", "evaluation_interval": f"{INTERVAL_S}s"}
        folder.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "alerts.yml", folder)
        command = [tool("prometheus"), f"--config.file={folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={servers.LOOPBACK}:{port}"]
        super().__init__("prometheus", command, f"{self.uri}/-/ready", folder)

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.uri}/api/v1/{path}?{urllib.parse.urlencode(query)}") as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and current value of every series of `expr`."""
        result = self.get("query", query=expr)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]


@pytest.mark.slow
@pytest.mark.long
def test_prometheus_shows_a_run_and_alerts_when_it_stalls(tmp_path: Path) -> None:
    often = {"RAY_metrics_report_interval_ms": str(1000 * INTERVAL_S)}
    with (
        servers.RayHead(tmp_path / "ray", env=often) as head,
        Prometheus(tmp_path / "prometheus", head.temp_dir) as prometheus,
    ):
        env = {"RAY_ADDRESS": head.address, "GOMP_SPINCOUNT": "7"}
        with Job("train", "digits", *ENDLESS, log=tmp_path / "log", env=env) as job:
            watch(job, lambda: members(head.process.pid, "ray::RayTrainWorker"), prometheus)
            job.process.terminate()
            assert job.wait() == 128 + signal.SIGTERM, job.output


def watch(job: Job, workers: Callable[[], list[psutil.Process]], prometheus: Prometheus) -> None:
    missing = {title for title, _ in expressions()}

    def are_filled() -> bool:
        missing.difference_update({title for title, expr in expressions() if prometheus.query(expr)})
        return missing <= WITHOUT_GPU

    try:
        job.wait_for(are_filled, poll_s=1)
    except TimeoutError as error:
        error.add_note(f"panels without data: {missing}")
        raise
    ((labels, seen),) = prometheus.query("ray_ddpm_images_seen")
    assert labels["run"] == "watched" and seen > 0
    assert prometheus.query("ray_ddpm_train_goodput == 1")
    assert prometheus.query("ray_ddpm_total_images == 1e8")
    rules = prometheus.get("rules")["groups"][0]["rules"]
    assert {rule["name"]: rule["health"] for rule in rules} == {"RunStalled": "ok", "MlflowBehind": "ok"}
    stalled = RULES[0]["expr"].replace("[5m]", f"[{8 * INTERVAL_S}s]")
    assert not prometheus.query(stalled)
    with paused(workers()):
        ((labels, _),) = job.wait_for(lambda: prometheus.query(stalled), poll_s=1)
        assert labels == {"run": "watched"}
    job.wait_for(lambda: not prometheus.query(stalled), poll_s=1)
    # The cluster's processes did not inherit the settings of the driver.
    assert {worker.environ()["GOMP_SPINCOUNT"] for worker in workers()} == {"7"}
