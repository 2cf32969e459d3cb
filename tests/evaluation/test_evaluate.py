"""Evaluation of checkpoints: results against direct computation, for any division of the work."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluated import CONFIG, POSITIONS, make_data, make_run

from ddpm.config.json import override
from ddpm.config.tree import SampleConfig
from ddpm.data import reading
from ddpm.data.manifest import Manifest, make_manifest, read_manifest, write_manifest
from ddpm.data.prepare import options_of, prepare
from ddpm.data.row_group import RowGroup
from ddpm.data.shards import open_row_group, write_shard
from ddpm.data.sources.sources import Digits
from ddpm.evaluation import bits_per_dim, evaluate, inputs, memorisation
from ddpm.evaluation.bits_per_dim import bound_score
from ddpm.evaluation.feature_scores import score_features
from ddpm.evaluation.features import features_of, images_of
from ddpm.evaluation.nets import PixelFeatures
from ddpm.evaluation.settings import Settings
from ddpm.runs import names, storage
from ddpm.runs.evaluations import NearerShare, Report
from ddpm.runs.run_folder import RunFolder
from ddpm.sampling import generate
from ddpm.utils.errors import UserError

CPU = torch.device("cpu")
FEW = {"num_images": 150, "features": "pixels", "num_draws": 2}


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """Small pieces of work: four of sampled and three of held-out images; and one thread, as in a worker pool."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PIECE_IMAGES", 40)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs"), shards)


def evaluated(uri: str, *, every: bool = False, num_workers: int | None = 1, **settings: Any) -> Report:
    return evaluate.evaluate(
        inputs.read_checkpoints([uri], every), Settings(**{**FEW, **settings}), num_workers
    )


@pytest.fixture(scope="module")
def one_worker(run: RunFolder) -> Report:
    """All checkpoints, by one worker."""
    return evaluated(run.location.uri, every=True)


def test_results_equal_those_of_one_batch(run: RunFolder, one_worker: Report, shards: str) -> None:
    """Known answers: the bound and the scores that the library computes from all images at once."""
    assert [result.images_seen for result in one_worker.results] == list(POSITIONS)
    (candidate,) = inputs.read_checkpoints([run.location.uri])
    chosen = inputs.prepare_reference([candidate], Settings(**FEW))  # type: ignore[arg-type]
    train = chosen.train.read(chosen.train.plan(0, 8192), 0, bits_per_dim.MEASURED_IMAGES)
    held_out = chosen.held_out.read(chosen.held_out.plan(0, 8192), 0, 150)
    measured = bits_per_dim.measure_errors(candidate, train)
    bits = bits_per_dim.bound_terms(candidate, measured, held_out, start=0, num_draws=2)
    *_, last = one_worker.results
    assert (last.drawn.name, last.drawn.is_own) == ("ddim-4", True)
    assert len({result.bits for result in one_worker.results}) == len(POSITIONS)
    expected = bound_score(bits)
    assert last.bits is not None
    assert (last.bits.name, last.bits.n) == (expected.name, 150)
    assert last.bits.value == pytest.approx(expected.value, rel=1e-5)
    assert last.bits.error == pytest.approx(expected.error, rel=1e-4)
    image = generate.draw(candidate, range(150))
    drawn = features_of(PixelFeatures((8, 8, 1)), image)
    *scores, share = last.drawn.scores
    for found, expected in zip(
        scores, score_features("pixels", drawn, chosen.real, chosen.other_real), strict=True
    ):
        assert (found.name, found.n, found.n_real) == (expected.name, 150, 150)
        assert found.floor == expected.floor
        assert found.value == pytest.approx(expected.value, rel=1e-3, abs=1e-4)
    everything = chosen.train.read(chosen.train.plan(0, 8192), 0, 1500).image
    of_held_out, of_drawn = memorisation.nearest([held_out.image, image.numpy()], [everything])
    assert share == memorisation.nearer_share("pixels", of_drawn, of_held_out)


def test_row_groups_are_opened_once_for_all_pieces_and_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known answers: the bound of each image, from pieces that are read one by one."""
    place = storage.resolve(str(tmp_path / "digits"))
    prepare(Digits(), place, rows_per_row_group=16)
    uris = names.checkpoints_of(make_run(tmp_path / "runs", place.uri).location.uri)[-2:]
    candidates = inputs.read_checkpoints(uris)
    settings = Settings(**FEW)  # type: ignore[arg-type]
    evaluate.evaluate(candidates, settings, 1, bounds=False)  # caches the features of real images
    opened: Counter[tuple[str, int]] = Counter()

    def counted(location: storage.Location, manifest: Manifest, split: str, index: int) -> RowGroup:
        opened[split, index] += 1
        return open_row_group(location, manifest, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "open_row_group", counted)
        report = evaluate.evaluate(candidates, settings)
    # Once for the bound, and once for the nearest training images.
    assert {split for split, _ in opened} == {"train", "test"} and max(opened.values()) == 2

    chosen = inputs.prepare_reference(candidates, settings)
    train = chosen.train.read(chosen.train.plan(0, 8192), 0, bits_per_dim.MEASURED_IMAGES)
    for candidate, result in zip(candidates, report.results, strict=True):
        measured = bits_per_dim.measure_errors(candidate, train)
        bits: list[float] = []
        for start in (0, 40, 80, 120):
            piece = chosen.held_out.read(chosen.held_out.plan(0, 8192), start, min(start + 40, 150))
            terms = bits_per_dim.bound_terms(candidate, measured, piece, start=start, num_draws=2)
            bits += terms.sum(axis=1).round(6).tolist()
        assert result.bits_of_image == tuple(bits)


def test_num_train_images_limits_the_search(run: RunFolder, one_worker: Report, tmp_path: Path) -> None:
    assert one_worker.settings["num_train_images"] == 1500
    for result in one_worker.results:
        assert isinstance(share := result.drawn.scores[-1], NearerShare)
        assert share.name == "nearer_than_held_out-pixels"
        assert result.drawn.nearest.startswith(b"\x89PNG")
    few, without = (
        evaluated(run.location.uri, num_images=40, num_train_images=n, cache=str(tmp_path)) for n in (30, 0)
    )
    assert [report.settings["num_train_images"] for report in (few, without)] == [30, 0]
    some = few.results[0].drawn
    none = without.results[0].drawn
    assert [s.name for s in none.scores] == [s.name for s in some.scores[:-1]]
    assert none.nearest == b""


@pytest.mark.parametrize("num_workers", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_several_workers_give_the_same_results_as_one(
    run: RunFolder, one_worker: Report, num_workers: int | None
) -> None:
    """Bit for bit, with threads of this process and with actors of a Ray cluster."""
    import ray

    try:
        again = evaluated(run.location.uri, every=True, num_workers=num_workers)
        assert ray.is_initialized() == (num_workers is not None)
    finally:
        ray.shutdown()
    assert again.to_json() == one_worker.to_json()
    assert again.results[-1].drawn.nearest == one_worker.results[-1].drawn.nearest
    assert again.key == one_worker.key


def test_reference_features_are_cached(
    run: RunFolder, one_worker: Report, shards: str, tmp_path: Path
) -> None:
    kept = {path.name for path in Path(shards, "evaluation").iterdir()}
    manifest = read_manifest(storage.resolve(shards))
    digest = one_worker.settings["features"]["digest"][:16]
    ours = {
        f"features-pixels-{digest}-{n}-{manifest.splits[split].fingerprint[:32]}.safetensors"
        for split, n in (("test", 150), ("train", 150))
    }
    assert ours <= kept  # other tests, which may run first, have other numbers of images
    evaluated(run.location.uri, cache=str(tmp_path / "elsewhere"))
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == ours


def test_a_run_means_its_newest_checkpoint_and_duplicates_are_dropped(run: RunFolder) -> None:
    uris = names.checkpoints_of(run.location.uri)
    found = inputs.read_checkpoints([run.location.uri, uris[-1], uris[0]])
    assert [candidate.state["images_seen"] for candidate in found] == [192, 64]
    assert {candidate.run for candidate in found} == {"judged"}


def test_the_sampling_configuration() -> None:
    def config(**settings: Any) -> SampleConfig:
        return inputs.sampling_config(CONFIG, Settings(**settings))

    assert (config().sampler, config().num_sample_steps) == ("ddim", 4)
    sample = config(sampler="dpmpp_2m", num_sample_steps=5)
    assert (sample.sampler, sample.num_sample_steps) == ("dpmpp_2m", 5)
    sample = config(sampler="ddpm", eta=1.0)
    assert sample == inputs.resolved(CONFIG, SampleConfig(sampler="ddpm", num_sample_steps=20, sigma_min=0.1))
    sample = config(eta=1.0, seed=3)
    assert (sample.eta, sample.seed, sample.num_sample_steps) == (1.0, 3, 4)
    assert config(sampler="ddpm", variance="beta").variance == "beta"
    assert config(sampler="heun", variance="beta").variance == "beta_tilde"  # it adds no noise
    with pytest.raises(UserError, match="variance is learned"):
        config(variance="learned")
    with pytest.raises(UserError, match=r"num_sample_steps is 21"):
        config(num_sample_steps=21)
    with pytest.raises(UserError, match="mix cannot undo the process gaussian"):
        config(sampler="mix")
    for sampler, resolved in {"auto": "ddim", "ddpm": "ddpm", "dpmpp_2m": "dpmpp_2m", "heun": "heun"}.items():
        sample = inputs.resolved(CONFIG, SampleConfig(sampler=sampler))  # type: ignore[arg-type]
        assert (sample.sampler, sample.num_sample_steps) == (resolved, 20)


def test_uniform_mix_is_evaluated_without_bits_per_dim(tmp_path: Path, shards: str) -> None:
    config = override(CONFIG, {"objective.process": "uniform_mix", "run.name": "mix"})
    run = make_run(tmp_path / "runs", shards, config)
    (result,) = evaluated(run.location.uri, num_images=40).results
    assert result.bits is None
    assert result.drawn.name == "mix-4"


def test_the_data_of_a_run_whose_shards_are_gone(tmp_path: Path, shards: str) -> None:
    """Builtin sources are prepared again, and give the same data; otherwise it is an error."""
    gone = make_run(tmp_path / "a", shards, override(CONFIG, {"data.source": "digits"}))
    (candidate,) = inputs.read_checkpoints([gone.location.uri])
    elsewhere = {"data.shards": str(tmp_path / "no-more")}
    moved = inputs.replace(candidate, config=override(candidate.config, elsewhere))
    chosen = inputs.prepare_reference([moved], Settings(**FEW))  # type: ignore[arg-type]
    assert chosen.train.location.uri == str(tmp_path / f"runs/data/digits-{options_of(Digits())[:8]}")
    assert chosen.train.rows.fingerprint == candidate.state["data_fingerprint"]
    nameless = inputs.replace(moved, config=override(moved.config, {"data.source": None}))
    with pytest.raises(UserError, match=r"/no-more.*--data$"):
        inputs.prepare_reference([nameless], Settings(**FEW))  # type: ignore[arg-type]


def other_data(folder: Path, side: int = 8, **rows: int) -> str:
    """Write a data set of noise with this many rows per split; returns its URI."""
    location = storage.resolve(str(folder))
    image = np.random.RandomState(0).randint(0, 256, (max(rows.values()), side, side, 1)).astype(np.uint8)
    shards = {
        split: [write_shard(location, f"{split}/00000.parquet", image[:n], None, rows_per_row_group=100)]
        for split, n in rows.items()
    }
    manifest = make_manifest("noise", (side, side, 1), "raw", [], shards, options="test")
    write_manifest(location, manifest)
    return location.uri


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (
            {"train": 100},
            {},
            "split named test",
        ),
        ({"train": 100, "test": 19}, {}, "19 images in its split test"),
        ({"train": 15, "test": 30}, {}, "15 images in its split train"),
        ({"train": 100, "test": 30, "side": 16}, {}, "8x8 .*16x16"),
        ({"test": 30}, {}, "has no split 'train'"),
        ({"train": 100, "test": 30}, {"features": "classifier"}, "classifier"),
        ({"train": 100, "test": 30}, {"num_sample_steps": 0}, "num_sample_steps is 0"),
        ({"train": 100, "test": 30}, {"guidance_scale": 3.0}, "--guidance-scale"),
        ({"train": 100, "test": 30}, {"sampler": "heun", "eta": 1.0}, "--eta"),
    ],
    ids=str,
)
def test_user_errors(
    run: RunFolder, tmp_path: Path, data: dict[str, int], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluated(run.location.uri, shards=other_data(tmp_path / "d", **data), **settings)


def test_errors_of_a_conditional_net_are_stratified_by_class(tmp_path: Path, shards: str) -> None:
    """Known answers: the library's score, image i having the class of held-out image i."""
    run = make_run(tmp_path / "runs", shards, override(CONFIG, {"model.num_classes": 10}))
    with pytest.raises(UserError, match=r"has 10 classes, but .* has 0"):
        evaluated(run.location.uri, shards=other_data(tmp_path / "d", train=100, test=30))
    (result,) = evaluated(run.location.uri).results
    (candidate,) = inputs.read_checkpoints([run.location.uri])
    chosen = inputs.prepare_reference([candidate], Settings(**FEW))  # type: ignore[arg-type]
    classes = np.resize(images_of(chosen.held_out, 0, 150).label, 150)
    assert len({*np.bincount(classes)}) > 1
    drawn = features_of(PixelFeatures((8, 8, 1)), generate.draw(candidate, range(150), label=classes))
    held, free = (score_features("pixels", drawn, chosen.real, label=label) for label in (classes, None))
    found = [s.error for s in result.drawn.scores if not isinstance(s, NearerShare)]
    assert found == pytest.approx([s.error for s in held], rel=1e-2)
    assert found != pytest.approx([s.error for s in free], rel=1e-2)


def test_checkpoints_of_different_data_need_the_data_set_flag(
    run: RunFolder, tmp_path: Path, shards: str
) -> None:
    noise = other_data(tmp_path / "d", train=100, test=30)
    other = make_run(tmp_path / "runs", noise, override(CONFIG, {"run.name": "noise"}))
    candidates = inputs.read_checkpoints([run.location.uri, other.location.uri])
    with pytest.raises(UserError, match=r"with --data$"):
        evaluate.evaluate(candidates, Settings(**FEW))  # type: ignore[arg-type]
    settings: dict[str, Any] = {**FEW, "num_images": 40, "shards": noise}
    results = evaluate.evaluate(candidates, Settings(**settings), 1).results
    assert [(result.run, result.saw_this_data) for result in results] == [("judged", False), ("noise", True)]


def test_a_net_of_one_timestep_is_evaluated(tmp_path: Path, shards: str) -> None:
    one = {"schedule.num_timesteps": 1, "sample.num_sample_steps": 1}
    run = make_run(tmp_path / "runs", shards, override(CONFIG, one))
    (result,) = evaluated(run.location.uri, num_images=40).results
    assert result.bits is not None and result.bits.is_finite
