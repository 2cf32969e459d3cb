"""examples/demo: the page shows what jobs/sample.py draws, while it is drawn.

gradio allows only some versions of Pillow, so `make test-all` installs it in a folder of its own, .venv/gradio.
"""

import base64
import re
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import examples, processes
from support.processes import Background
from support.tiny import TINY_NET

import ddpm
from ddpm.build import TrainedNet, build_net
from ddpm.config.json import override
from ddpm.runs import checkpoint
from ddpm.sampling import generate
from ddpm.utils import images
from ddpm.utils.images import Pixels

FOLDER = Path(sys.prefix, "gradio")
SCRIPT = examples.FOLDER / "demo/demo.py"
WITH_GRADIO = processes.python_path(FOLDER, examples.FOLDER / "demo")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER.is_dir() and find_spec("gradio") is None,
        reason="gradio is missing; `make .venv/gradio/installed` installs it",
    ),
]


def drawn(trained: TrainedNet, **settings: Any) -> Pixels:
    """The grid of the first two images."""
    sample = replace(trained.config.sample, **settings)
    return images.grid(generate.draw(trained.sampled_with(sample), range(2)).numpy())


def shown(page: Any) -> list[Pixels]:
    """The pictures on the page."""
    urls = page.evaluate("[...document.querySelectorAll('figure img')].map(image => image.src)")
    return [images.from_png(base64.b64decode(url.partition(",")[2])) for url in urls]


def test_the_page_shows_what_is_sampled_and_needs_no_network(browser: Any, tmp_path: Path) -> None:
    changes = {"schedule.num_timesteps": 40, "model.num_classes": 3, "model.zero_init": False}
    config = override(TINY_NET, changes)  # with labels, and fewer timesteps than the other
    tiny = TrainedNet(build_net(config).eval(), config)
    checkpoint.write_net(tiny, {"images_seen": 0}, tmp_path / "<b>")
    runs = {"builtin:digits": ddpm.Run("builtin:digits").trained, "<b>": tiny}
    page = browser.new_page()
    requests = list[str]()
    problems = list[str]()
    page.set_default_timeout(300_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))

    def shows(**settings: Any) -> None:
        expected = [drawn(trained, **settings) for trained in runs.values()]

        def is_shown() -> bool:
            pictures = shown(page)
            return len(pictures) == len(expected) and all(map(np.array_equal, pictures, expected))

        processes.wait_for(is_shown)

    words = [sys.executable, SCRIPT, *runs, "--num-images", 2, "--port", 0]
    with Background(words, log=tmp_path / "log", cwd=tmp_path, env=WITH_GRADIO) as job:
        address = job.wait_for(lambda: re.search(r"running on (http://127\.0\.0\.1:\d+)", job.output))[1]
        page.goto(address)
        shows(num_sample_steps=40)
        assert page.locator("figcaption").all_inner_texts() == [f"{uri}, step 40 of 40" for uri in runs]
        page.get_by_label("number input for Steps").fill("3")
        page.get_by_label("number input for Seed").fill("7")
        page.get_by_label("number input for Guidance").fill("2.5")
        page.get_by_role("button", name="Sample").click()
        shows(num_sample_steps=3, seed=7, guidance_scale=2.5)
        for width in (390, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
        page.close()
        job.process.send_signal(signal.SIGINT)
        assert job.wait() == 0, job.output
    assert problems == []
    assert [url for url in requests if not url.startswith((f"{address}/", "data:"))] == []


TWO_PROCESSES = """
import demo
from support.tiny import TINY_NET
from ddpm.build import TrainedNet, build_net
from ddpm.config.json import override

changes = {"sample.sampler": "dpmpp_2m"}, {"objective.process": "uniform_mix"}
configs = [override(TINY_NET, changed) for changed in changes]
page = demo.build({str(i): TrainedNet(build_net(config), config) for i, config in enumerate(configs)}, 1)
(dropdown,) = (block for block in page.blocks.values() if type(block).__name__ == "Dropdown")
print(dropdown.value, [name for name, _ in dropdown.choices])
"""


def test_runs_of_different_processes_begin_with_a_sampler_that_both_have() -> None:
    done = processes.run([sys.executable, "-c", TWO_PROCESSES], cwd=processes.REPO / "tests", env=WITH_GRADIO)
    assert done.stdout.splitlines()[-1:] == ["auto ['auto']"], done.stderr


def test_three_runs_are_a_user_error(tmp_path: Path) -> None:
    words = [sys.executable, SCRIPT, *["builtin:digits"] * 3]
    done = processes.run(words, cwd=tmp_path, env=WITH_GRADIO)
    assert done.returncode == 2 and done.stderr.startswith("error: 3 runs are given"), done.stderr
