"""Sample in the browser: python examples/demo/demo.py RUN [RUN]

Images appear as they are denoised, of two runs side by side, with the same settings. It needs requirements.txt.
`generate.denoising` draws what `ddpm.Run.sample` draws, and yields every step.
"""

import base64
import html
import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import fastapi
import gradio as gr
import tyro
import uvicorn

import ddpm
from ddpm.build import TrainedNet, num_sample_steps, resolve_sample
from ddpm.cli import parsing
from ddpm.config import kinds
from ddpm.config.json import override
from ddpm.sampling import generate
from ddpm.utils import devices, images
from ddpm.utils.errors import UserError

FRAMES = 25  # at most, of one sampling; the page would show more of them late
CSS = """.shown { flex: 4 1 300px } .runs { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { flex: 1 1 18rem; max-width: 44rem; margin: 0 }
figure img { width: 100%; image-rendering: pixelated }"""
FIGURE = """<figure><img src="data:image/png;base64,{2}" alt="images of {0}" decoding="sync">
<figcaption><b>{0}</b>, {1}</figcaption></figure>"""


def build(runs: Mapping[str, TrainedNet], num_images: int) -> gr.Blocks:
    """The page: the images of each run, and the settings, which begin as the first run's."""
    configs = [trained.config for trained in runs.values()]
    first = configs[0].sample
    processes = {kinds.objective(config.objective.process).process for config in configs}
    samplers = ["auto", *(kinds.samplers_of(*processes) if len(processes) == 1 else [])]
    resolved = resolve_sample(first, configs[0].objective)
    num_steps = num_sample_steps(resolved, configs[0].schedule.num_timesteps)
    most = min(config.schedule.num_timesteps for config in configs)
    has_labels = any(config.model.num_classes and config.objective.label_dropout for config in configs)

    def sample(seed: int, num_steps: int, sampler: str, scale: float) -> Iterator[str]:
        settings = {"seed": seed, "num_sample_steps": num_steps, "sampler": sampler, "guidance_scale": scale}
        changes = {f"sample.{key}": value for key, value in settings.items()}
        changed = [run.sampled_with(override(run.config, changes).sample) for run in runs.values()]
        every = math.ceil(num_steps / FRAMES)
        frames = zip(*(generate.denoising(run, range(num_images), every) for run in changed), strict=True)
        for i, drawn in enumerate(frames):
            caption = f"step {min(i * every, num_steps)} of {num_steps}"
            pngs = [base64.b64encode(images.png_bytes(images.grid(pixels))).decode() for pixels in drawn]
            named = zip(map(html.escape, runs), pngs, strict=True)
            figures = [FIGURE.format(name, caption, png) for name, png in named]
            yield f'<div class="runs">{"".join(figures)}</div>'

    with gr.Blocks(title="ddpm demo", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# From noise to images")
        with gr.Row():
            shown = gr.HTML(elem_classes="shown")
            with gr.Column(min_width=300):
                seed = gr.Slider(0, 999, first.seed, step=1, label="Seed")
                steps = gr.Slider(1, most, min(num_steps, most), step=1, label="Steps")
                chosen = first.sampler if first.sampler in samplers else "auto"
                sampler = gr.Dropdown(samplers, value=chosen, label="Sampler")
                scale = gr.Slider(0, 8, first.guidance_scale, label="Guidance", visible=has_labels)
                button = gr.Button("Sample", variant="primary")
                stop = gr.Button("Stop")
        starts = [page.load, button.click, sampler.input, *(s.release for s in (seed, steps, scale))]
        settings = [seed, steps, sampler, scale]
        event = gr.on(starts, sample, settings, shown, trigger_mode="always_last", show_progress="hidden")
        stop.click(None, cancels=[event])
    return page


def serve(page: gr.Blocks, port: int) -> None:
    """Serve the page, to this machine alone, until Ctrl-C."""
    # Not by gradio's `launch`, which fails where its server does not answer at once, or only through a proxy.
    app = fastapi.FastAPI()
    theme = gr.themes.Default(primary_hue="blue", font=("system-ui", "sans-serif"))
    gr.mount_gradio_app(app, page, "/", theme=theme, css=CSS, footer_links=[], run_history=False)
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, timeout_graceful_shutdown=1)


def main(
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN]")],
    num_images: int = 16,
    port: int = 7860,
) -> None:
    """
    Args:
        runs: Folders or URIs of runs or checkpoints, registered models, or built-in nets.
        num_images: Images of each.
        port: Port on this machine; 0: any free one.
    """
    if len(runs) not in (1, 2):
        raise UserError(f"{len(runs)} runs are given; expected one, or two to compare")
    nets = {uri: ddpm.Run(uri).trained for uri in runs}
    for trained in nets.values():
        trained.net.to(devices.default())
    serve(build(nets, num_images), port)


if __name__ == "__main__":
    parsing.run(lambda: tyro.cli(main, description=__doc__))
