"""The demonstration in the browser: it shows what jobs/sample.py draws, while it is drawn."""

import base64
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import processes
from support.processes import Job
from support.tiny import TINY_NET

import ddpm
from ddpm.build import TrainedNet, build_net
from ddpm.checkpoints import checkpoint
from ddpm.config_io import override
from ddpm.sampling import generate
from ddpm.utils import images


def png(trained: TrainedNet, **settings: Any) -> str:
    drawn = generate.draw(trained.sampled_with(replace(trained.config.sample, **settings)), range(2))
    return f"data:image/png;base64,{base64.b64encode(images.png_bytes(images.grid(drawn.numpy()))).decode()}"


@pytest.mark.slow
def test_the_page_shows_what_is_sampled_and_needs_no_network(browser: Any, tmp_path: Path) -> None:
    changes = {"schedule.num_timesteps": 40, "model.num_classes": 3, "model.zero_init": False}
    config = override(TINY_NET, changes)  # with labels, and fewer timesteps than the other
    tiny = TrainedNet(build_net(config).eval(), config)
    checkpoint.write_net(tiny, {"images_seen": 0}, tmp_path / "<b>")
    runs = {"builtin:digits": ddpm.Run("builtin:digits").trained, "<b>": tiny}
    page, requests, problems = browser.new_page(), list[str](), list[str]()
    page.set_default_timeout(300_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))

    def shows(**settings: Any) -> None:
        page.wait_for_function(
            "pngs => String([...document.querySelectorAll('figure img')].map(i => i.src)) == String(pngs)",
            arg=[png(trained, **settings) for trained in runs.values()],
        )

    with Job("demo", *runs, "--num-images", 2, "--port", 0, log=tmp_path / "log") as job:
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
from support.tiny import TINY_NET
from ddpm.build import TrainedNet, build_net
from ddpm.config_io import override
from ddpm.hub import demo

changes = {"sample.sampler": "dpmpp_2m"}, {"objective.process": "consistency", "objective.predict": "v"}
configs = [override(TINY_NET, changed) for changed in changes]
page = demo.build({str(i): TrainedNet(build_net(config), config) for i, config in enumerate(configs)}, 1)
(dropdown,) = (block for block in page.blocks.values() if type(block).__name__ == "Dropdown")
print(dropdown.value, [name for name, _ in dropdown.choices])
"""


def test_runs_of_different_processes_begin_with_a_sampler_that_both_have() -> None:
    pytest.importorskip("gradio")
    done = processes.run([sys.executable, "-c", TWO_PROCESSES], cwd=processes.REPO / "tests")
    assert done.stdout.splitlines()[-1:] == ["auto ['auto']"], done.stderr


def test_user_errors_are_one_line(user_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3 runs are given; expected one, or two" in user_error("demo", *["builtin:digits"] * 3)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'ddpm-on-ray[demo]'" in user_error("demo", "builtin:digits")
