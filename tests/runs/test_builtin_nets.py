"""Nets that come with the package, and model cards."""

import json
import re
from pathlib import Path

import builtin_nets as program
import pytest
import torch
from support import evaluated, reported

from ddpm.config.json import override
from ddpm.config.presets import PRESETS
from ddpm.export import card
from ddpm.runs import checkpoint, names, run_folder
from ddpm.utils.errors import UserError


def test_a_packed_net_is_a_checkpoint_without_a_run(
    tmp_path: Path, digits_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "NETS", tmp_path / "nets")
    run = evaluated.make_run(tmp_path, digits_uri).location.uri
    program.pack(run, "tiny")
    with names.local_checkpoint(run) as folder, names.local_checkpoint("builtin:tiny") as unpacked:
        theirs, ours = (checkpoint.load_net(path).net.state_dict() for path in (folder, unpacked))
        position = checkpoint.read_state(unpacked)
        config = checkpoint.read_config(unpacked)
    assert all(torch.equal(ours[name], theirs[name].half().float()) for name in theirs)
    assert position == {**position, "images_seen": evaluated.POSITIONS[-1], "run_key": ""}
    assert config.data.shards is None and config.run.name == "tiny"
    with pytest.raises(UserError, match=r"builtin:large.*builtin:tiny"):
        names.local_checkpoint("builtin:large").__enter__()


@pytest.mark.parametrize("name", sorted(path.parent.name for path in names.NETS.glob("*/README.md")))
def test_each_net_fits_its_preset_and_its_card_has_scores_and_licences(name: str) -> None:
    with names.local_checkpoint(f"builtin:{name}") as folder:
        config = checkpoint.read_config(folder)
    checkpoint.check_same_net(config, PRESETS[name], folder)
    assert config.sample == PRESETS[name].sample
    text = card.card(f"builtin:{name}")
    bits = r"\| bits/dim \| [1-4]\.\d+ ± 0\.\d+ \|"
    kid = r"\| KID-classifier \| -?0\.0\d+ ± 0\.\d+ \|"
    for line in (
        "license: apache-2.0",
        bits,
        kid,
        "- images: .*, (CC BY 4.0|MIT)",
        f"- command: .* {name} .*",
    ):
        assert re.search(f"^{line}", text, re.MULTILINE), line


def test_a_card_has_data_training_and_the_scores_of_the_newest_checkpoint(
    tmp_path: Path, digits_uri: str
) -> None:
    run = evaluated.make_run(tmp_path, digits_uri, override(evaluated.CONFIG, {"data.source": "digits"}))
    facts = {"command": "python x.py\n- licence: free", "versions": {"version.ddpm": "0.1.0"}}
    file = run.location.child(run_folder.CARD)
    file.write(json.dumps(json.loads(file.read()) | facts).encode())
    run_folder.write_status(run.location, run_folder.Status("FINISHED", 192, 0, 1.5))
    for i, images_seen in ((1, 192), (7, 128)):
        result = reported.result(i, reported.drawn(i), run_key=run.key, images_seen=images_seen)
        file = run.location.child(run_folder.EVALUATIONS).child(f"{i}.json")
        file.write(reported.made(result).to_json().encode())
    lines = card.card(run.location.uri).splitlines()
    assert {
        "# judged",
        "- images: digits of scikit-learn (E. Alpaydin, C. Kaynak, UCI 1998), CC BY 4.0",
        "- minutes: 1.5",
        "- versions: ddpm 0.1.0",
        r"- command: python x.py\n- licence: free",
        "| bits/dim | 4.4679 ± 0.0500 |  |",
        "| KID-pixels | 0.0074 ± 0.0110 | 1.2000 ± 0.0300 |",
        "    schedule.kind = cosine",
    } <= {*lines}
    assert sum("bits/dim |" in line for line in lines) == 1
