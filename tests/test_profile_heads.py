"""Which of a profile's draft heads is taken for which pipeline flags."""

from pathlib import Path

import pytest
from distributed_models import save_deep_head, save_llama

from ppsd_cli.assets import resolve_model
from ppsd_cli.commands.session import ModelChoice, make_plan
from ppsd_cli.config import Settings, read_profile
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.head_files import read_info


def test_the_first_fitting_head_is_taken(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    hash_ = resolve_model(str(model)).model_hash
    for name, depths in {"two": (2, 4), "three": (1, 2, 4)}.items():
        folder = save_deep_head(model, tmp_path / name, depths)
        text = (folder / "head.json").read_text()
        info = read_info(folder)
        (folder / "head.json").write_text(text.replace(info.model_hash, hash_))
    profile = tmp_path / "both.yaml"
    profile.write_text(f"name: both\nmodel: {model}\nheads: [two, three]\n")

    def taken(**flags: object) -> str | None:
        choice = ModelChoice(None, str(profile), None, offline=True)
        return make_plan(choice, Settings(**flags), lambda _: None).head_name

    assert taken() == "two"
    assert taken(stages=3) == "three"
    assert taken(stages=2) == "two"
    assert taken(exit_layer=1) == "three"
    assert taken(split=(1, 1, 2)) == "three"
    assert taken(split=(1, 2, 1)) == "three"
    assert taken(split=(2, 1, 1)) == "raw"
    assert taken(stages=4) == "raw"
    assert taken(devices=("cpu", "cpu", "cpu")) == "three"
    assert taken(head="raw") == "raw"
    assert taken(decoder="ar") is None


def test_heads_must_be_names(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\nheads: 3\n")
    with pytest.raises(ConfigError, match="heads: 3 is no list of names"):
        read_profile(path)
