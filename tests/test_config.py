"""Settings and profiles: parsing, precedence, and mistakes that are named."""

import math

import pytest

from ppsd_cli.config import (
    Settings,
    check,
    load_profile,
    parse_devices,
    parse_split,
    profile_names,
    read_profile,
)
from ppsd_cli.errors import AssetError, ConfigError

GOOD = """
name: demo
model: some/model
revision: abc
model_hash: sha256:00
wheel: {package: p, version: '1', member: m, sha256: '00', size: 5}
evidence: {measured: here}
settings:
  decoder: ppsd
  split: [10, 10, 10]
  devices: [cpu, cpu, cpu]
  head: heads/x
  temperature: 0
  top_p: 0.9
  context: 2048
"""


@pytest.fixture
def profile(tmp_path):
    def write(text, name="demo"):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_complete_profile(profile, tmp_path):
    read = read_profile(profile(GOOD))
    assert read.name == "demo"
    assert read.model == "some/model"
    assert read.revision == "abc"
    assert read.wheel is not None
    assert read.wheel.size == 5
    assert read.folder == tmp_path
    assert read.settings == Settings(
        decoder="ppsd",
        split=(10, 10, 10),
        devices=("cpu",) * 3,
        head="heads/x",
        temperature=0,
        top_p=0.9,
        context=2048,
    )
    assert load_profile("demo", (tmp_path,)) == read
    assert load_profile(str(tmp_path / "demo.yaml"), ()) == read
    assert profile_names((tmp_path,)) == ["demo"]


def test_an_almost_empty_profile(profile):
    assert read_profile(profile("name: x\n")).settings == Settings()
    assert read_profile(profile("{model: a/b}\n", "own")).name == "own"
    assert read_profile(profile("settings:\n")).settings == Settings()


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("nmae: x", ConfigError, "unknown key 'nmae'; did you mean 'name'"),
        ("settings: {exit_laier: 3}", ConfigError, "'exit_laier'; did you mean 'exit_layer'"),
        ("settings: {zzzzzz: 3}", ConfigError, "unknown key 'zzzzzz'$"),
        ("1: 2", ConfigError, "unknown key 1"),
        ("wheel: {package: p}", ConfigError, "missing"),
        ("wheel: {packge: p}", ConfigError, "did you mean 'package'"),
        ("wheel: 3", ConfigError, "wheel: expected keys"),
        ("settings: [1]", ConfigError, "expected keys"),
        ("settings: {stages: two}", ConfigError, "stages: 'two' has the wrong type"),
        ("settings: {stages: true}", ConfigError, "stages: True has the wrong type"),
        ("settings: {stages: 2.5}", ConfigError, "stages: 2.5 has the wrong type"),
        ("settings: {split: 10}", ConfigError, "split: 10 has the wrong type"),
        ("settings: {split: [a, b]}", ConfigError, "split"),
        ("settings: {split: [3, 0]}", ConfigError, "split"),
        ("settings: {devices: [1]}", ConfigError, "devices"),
        ("settings: {devices: [gpu0]}", ConfigError, "gpu0"),
        ("settings: {stages: 0}", ConfigError, "stages 0"),
        ("settings: {decoder: magic}", ConfigError, "magic"),
        ("settings: {temperature: .nan}", ConfigError, "nan"),
        ("settings: {top_p: -1}", ConfigError, "top-p -1"),
        ("model: 3", ConfigError, "model"),
        ("model_hash: [1]", ConfigError, "model_hash"),
        ("- a\n- b", AssetError, "keys and values"),
        ("", AssetError, "keys and values"),
        ("a: [", AssetError, "not YAML"),
        ("a: !!python/object/apply:os.system [echo]", AssetError, "not YAML"),
        (b"name: \xff\xfe", AssetError, "not UTF-8 at byte 6"),
        (b"name: \x00", AssetError, "not YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_a_profile(profile, text, error, says):
    path = profile(text)
    with pytest.raises(error, match=says) as caught:
        read_profile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_profile_names_cannot_leave_their_folder(tmp_path):
    for name in ("..", "a b", "x;y"):
        with pytest.raises((ConfigError, AssetError)):
            load_profile(name, (tmp_path,))
    with pytest.raises(AssetError, match="no profile at"):
        load_profile("../secret", (tmp_path,))
    with pytest.raises(AssetError, match="there are: none"):
        load_profile("nothing", (tmp_path,))


def test_flags_go_over_the_profile():
    base = Settings(exit_layer=10, stages=3, head="h", devices=("cpu",) * 3, top_k=5, context=9)
    assert Settings().over(base) == base
    changed = Settings(top_k=0, temperature=0.5).over(base)
    assert (changed.top_k, changed.temperature, changed.stages) == (0, 0.5, 3)
    shaped = Settings(stages=2).over(base)
    assert (shaped.stages, shaped.exit_layer, shaped.head, shaped.devices) == (2, None, None, None)
    assert shaped.context == 9
    with_head = Settings(split=(3, 3), head="mine").over(base)
    assert (with_head.split, with_head.stages, with_head.head) == ((3, 3), None, "mine")
    moved = Settings(devices=("cuda:0",)).over(base)
    assert (moved.devices, moved.stages, moved.head) == (("cuda:0",), 3, "h")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(temperature=-0.1),
        Settings(temperature=1e-40),
        Settings(temperature=math.nan),
        Settings(temperature=math.inf),
        Settings(top_k=-1),
        Settings(top_p=0.0),
        Settings(top_p=1.1),
        Settings(top_p=math.nan),
        Settings(min_p=-0.1),
        Settings(min_p=1.5),
        Settings(min_p=math.nan),
        Settings(max_new_tokens=0),
        Settings(context=-5),
        Settings(threads=0),
        Settings(stages=0),
        Settings(exit_layer=0),
        Settings(draft_vocab=0),
        Settings(decoder="eesd2"),
        Settings(dtype="int4"),
    ],
    ids=str,
)
def test_values_that_no_model_could_make_right(settings):
    with pytest.raises(ConfigError, match="--"):
        check(settings)


def test_values_at_their_limits():
    check(Settings(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=1, stages=1))
    check(Settings(top_p=1e-6, min_p=1.0, dtype="auto", decoder="auto"))


def test_split_and_devices():
    assert parse_split("10, 12,8") == (10, 12, 8)
    for text in ("", "a", "10,,3", "1.5,2", "10;3"):
        with pytest.raises(ConfigError, match="10,10,10"):
            parse_split(text)
    for text in ("10,0", "-1,3"):
        with pytest.raises(ConfigError, match="at least one layer"):
            parse_split(text)
    assert parse_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert parse_devices("cpu,cpu") == ("cpu", "cpu")
    for text in ("gpu", "cuda:", "cuda:x", "", "cpu,"):
        with pytest.raises(ConfigError, match="no device"):
            parse_devices(text)
    with pytest.raises(ConfigError, match="mixed"):
        parse_devices("cpu,cuda:0")
