"""The code of a model in MLflow's registry: images over HTTP.

MLflow keeps a copy of this file in the model and runs it to load the model (`mlflow models serve`), so no pickle is
needed. For that reason the file has side effects at import, and no other module imports it.

    POST /invocations {"inputs": [{"num_images": 2, "seed": 7}]}
    {"predictions": [{"index": 0, "png": "iVBORw0K..."}, {"index": 1, "png": ...}]}

png is base64. Image i equals that of jobs/sample.py with that seed and the checkpoint's own settings. A call may
request up to 4,096 images in total.
"""

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddpm.utils.openmp import bound_spinning

bound_spinning()  # before PyTorch is imported

# ruff: noqa: E402
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel, ConfigDict, Field

from ddpm.checkpoints import checkpoint
from ddpm.sampling import generate
from ddpm.utils import devices, images

BATCH_SIZE = 64
MAX_IMAGES = 4096
"""Largest number of images of all requests in one call."""


class Request(BaseModel):
    """Images 0..num_images-1 of a seed."""

    model_config = ConfigDict(extra="forbid")

    num_images: int = Field(ge=1, le=MAX_IMAGES)
    seed: int = Field(ge=0)
    label: int | None = None
    """The class of all images; None: image i has class i mod num_classes."""


class Picture(BaseModel):
    """Image `index` of its request."""

    index: int
    png: str


class Generator(PythonModel):
    """The averaged net of a checkpoint, ready for sampling."""

    def load_context(self, context: Any) -> None:
        device = devices.default()
        self.trained = checkpoint.load_net(Path(context.artifacts["checkpoint"]), device)

    def predict(self, model_input: list[Request]) -> list[Picture]:  # type: ignore[override]  # as MLflow documents
        total = sum(request.num_images for request in model_input)
        if total > MAX_IMAGES:
            raise ValueError(f"the requests ask for {total} images together; the limit is {MAX_IMAGES}")
        for request in model_input:
            generate.check_label(self.trained.config, request.label)
        return [picture for request in model_input for picture in self._draw(request)]

    def _draw(self, request: Request) -> Iterator[Picture]:
        trained = self.trained.sampled_with(replace(self.trained.config.sample, seed=request.seed))
        for start in range(0, request.num_images, BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, request.num_images))
            drawn = generate.draw(trained, indices, label=request.label)
            for index, image in zip(indices, drawn.cpu().numpy(), strict=True):
                yield Picture(index=index, png=base64.b64encode(images.png_bytes(image)).decode())


set_model(Generator())
