"""infra/grafana, checked by Debian's Prometheus: its files, and its dashboard of a run on a real cluster."""

import json
import re
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from support import servers
from support.launched import cluster_file
from support.processes import REPO, Job, members

FOLDER = REPO / "infra/grafana"
DASHBOARD = json.loads((FOLDER / "dashboards/ddpm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
WITHOUT_GPU = {"GPU", "MFU"}
"""Panels that are empty for a run on CPUs."""
INTERVAL_S = 4
"""The default of Ray and Prometheus is 10."""
ENDLESS = """--schedule.num-timesteps 100 --model.base-width 8 --model.norm-groups 4 --train.total-images 100000000
    --train.batch-size 64 --train.micro-batch-size 32 --train.log-every-images 1024
    --train.checkpoint-every-images 4096 --train.sample-every-images 0 --sample.num-images 1
    --sample.num-sample-steps 1 --run.name watched --run.storage runs --cluster.num-workers 1""".split()


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


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml")


def test_every_panel_has_a_valid_query(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": expr} for i, (_, expr) in enumerate(expressions())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_both_programs_listen_on_loopback_and_find_their_files() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    places = {}
    for volume in services["prometheus"]["volumes"] + services["grafana"]["volumes"]:
        here, there, *_ = volume.split(":")
        if here.startswith("."):
            places[there] = FOLDER / here
    assert places["/etc/prometheus/prometheus.yml"].is_file()
    provisioning = places["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    ours, rays = yaml.safe_load((provisioning / "dashboards/dashboards.yaml").read_text())["providers"]
    assert (places[ours["options"]["path"]] / "ddpm.json").is_file()
    assert rays["options"]["path"].startswith("/tmp/ray/")


@pytest.mark.parametrize("name", ["cluster.yaml", "infra/onprem/cluster.yaml"])
def test_a_head_starts_both_if_the_lines_are_uncommented(name: str) -> None:
    text = re.sub(r"^( +)#(.*) # METRICS$", r"\1\2", (REPO / name).read_text(), flags=re.MULTILINE)
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    plain = cluster_file(name)
    ((there, here),) = config["file_mounts"].items() - plain["file_mounts"].items()
    *before, docker, start = config["head_start_ray_commands"]
    assert before == plain["head_start_ray_commands"] and docker.startswith("docker compose version || ")
    (compose,) = re.findall(r"--file (\S+)", start)
    assert (REPO / here / compose.removeprefix(f"{there}/")).is_file()


class Prometheus(servers.Server):
    """Debian's Prometheus with the repository's files, but a shorter scrape interval."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        (port,) = servers.free_ports(1)
        self.uri = f"http://{servers.LOOPBACK}:{port}"
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text().replace("/tmp/ray", str(ray_folder)))
        config["global"] = {"scrape_interval": f"{INTERVAL_S}s", "evaluation_interval": f"{INTERVAL_S}s"}
        folder.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [tool("prometheus"), f"--config.file={folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={servers.LOOPBACK}:{port}"]
        super().__init__("prometheus", command, f"{self.uri}/-/ready", folder)

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and current value of every series of `expr`."""
        url = f"{self.uri}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        with urllib.request.urlopen(url) as answer:
            result = json.load(answer)["data"]["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]


@pytest.mark.slow
@pytest.mark.long
def test_every_panel_shows_a_run(tmp_path: Path) -> None:
    often = {"RAY_metrics_report_interval_ms": str(1000 * INTERVAL_S)}
    with (
        servers.RayHead(tmp_path / "ray", env=often) as head,
        Prometheus(tmp_path / "prometheus", head.temp_dir) as prometheus,
    ):
        env = {"RAY_ADDRESS": head.address, "GOMP_SPINCOUNT": "7"}
        with Job("train", "digits", *ENDLESS, log=tmp_path / "log", env=env) as job:
            watch(job, prometheus)
            # The cluster's processes did not inherit the settings of the driver.
            workers = members(head.process.pid, "ray::RayTrainWorker")
            assert {worker.environ()["GOMP_SPINCOUNT"] for worker in workers} == {"7"}
            job.process.terminate()
            assert job.wait() == 128 + signal.SIGTERM, job.output


def watch(job: Job, prometheus: Prometheus) -> None:
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
