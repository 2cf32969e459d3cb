"""The pages that a person follows: their commands are run in their order, with small nets and few images."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import processes
from support.processes import REPO

RECIPES = REPO / "docs/recipes"
ELSEWHERE = {
    "aws": "tests/infra/test_aws_cluster.py launches the cluster file, and submits jobs",
    "existing-cluster": "tests/jobs/test_cluster_jobs.py submits jobs",
    "kubernetes": "tests/infra/test_kubernetes.py validates the manifests",
    "large-photos": "tests/latents runs its commands, with a small autoencoder",
    "notebooks": "it has Python alone, which is run below",
    "operate": "tests/infra starts MLflow, Prometheus and clusters with tokens",
    "own-machines": "tests/infra/test_onprem.py launches the cluster file, and submits jobs",
}
"""Recipes whose commands need machines, or that have none, and what runs them instead."""
PAGES = [
    REPO / "README.md",
    REPO / "docs/quickstart.md",
    *(page for page in sorted(RECIPES.glob("*.md")) if page.stem not in ELSEWHERE),
]
OWN_CLUSTER = ("own-net", "s3")
"""Recipes whose workers need the environment of the commands, which those of a running cluster do not get."""
NOT_RUN = re.compile(r"make |\. \.venv|ray |ddpm ui")
"""Lines that install, need a cluster, or serve until they are interrupted."""
NET = "--model.base-width 8 --model.norm-groups 4 --schedule.num-timesteps 20"
TRAINING = """--train.total-images 64 --train.batch-size 32 --train.micro-batch-size 8 --train.held-out-images 20
    --sample.num-images 4 --sample.num-sample-steps 2"""
SMALL = {
    "train": TRAINING,
    "search": f"{TRAINING} --num-trials 2 --finalists 2 --drawn-images 20 --num-images 20 --num-rungs 1",
    "evaluate": "--num-images 20 --num-draws 1 --features pixels",
}
"""Flags that follow those of a command, and so replace them."""


def lines_of(page: Path) -> list[str]:
    """The lines of the blocks of a page that are for a shell."""
    found = re.findall(r"^( *)```bash\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(block for _, block in found).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+# .*", "", line.strip()) for line in lines]


def smaller(line: str) -> str:
    """`line` with a small net and few images; a run keeps the name that the page's own command gives it."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    if words[:1] != ["ddpm"] or words[1] not in SMALL or "--dry-run" in words:
        return line
    line = f"{line} {' '.join(SMALL[words[1]].split())}"
    if words[1] == "evaluate":
        return line
    if "--model.net" not in words and "--train.init-from" not in words:
        line = f"{line} {NET}"
    if words[1] == "train" and not {"--workers", "--cluster.num-workers"} & {*words}:
        line = f"{line} --cluster.num-workers 1"
    if words[1] == "train" and "--name" not in words:
        name = f"folder-{words[3]}" if words[2] == "folder" else words[2]
        line = f"{line} --name {name}"
    return line


def write_photos(folder: Path) -> None:
    """Two classes of 60 images: bright squares, dark squares."""
    random = np.random.default_rng(0)
    for name, low in (("flower", 128), ("temple", 0)):
        (folder / name).mkdir(parents=True)
        for i in range(60):
            pixels = random.integers(low, low + 128, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40)).save(folder / name / f"{i:03d}.png")


def test_recipes_that_are_run_elsewhere_exist() -> None:
    assert ELSEWHERE.keys() <= {page.stem for page in RECIPES.glob("*.md")}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if page.stem not in OWN_CLUSTER:
        request.getfixturevalue("on_ray_head")
    lines = [smaller(line) for line in lines_of(page) if not NOT_RUN.match(line)]
    script = "\n".join(lines).replace("PYTHONPATH=", "PYTHONPATH=$PYTHONPATH:")
    if "s3://BUCKET" in script:
        script = script.replace("s3://BUCKET", request.getfixturevalue("s3_bucket"))
    write_photos(tmp_path / "photos")
    (tmp_path / "examples").symlink_to(REPO / "examples")
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        **processes.python_path(REPO),
    }
    done = processes.run(["bash", "-exuc", script], cwd=tmp_path, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
@pytest.mark.parametrize("page", [REPO / "README.md", RECIPES / "notebooks.md"], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text(re.sub(r"total_images=[\d_]+", "total_images=640", "".join(blocks)))
    done = processes.run([sys.executable, script], cwd=tmp_path, env=processes.python_path(REPO))
    assert done.returncode == 0, done.stderr[-4000:]
