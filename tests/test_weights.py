"""Reading tensors from real saved models, whole and sharded; damaged files; atomic saving."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppsd_cli.errors import AssetError, ResourceError
from ppsd_cli.model import weights
from ppsd_cli.model.shards import weight_files
from ppsd_cli.model.weights import Checkpoint, save_tensors

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def save_model(folder: Path, *, kind: str = "Llama", **kwargs):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(folder, **kwargs)
    return model


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_every_tensor_of_a_real_model(tmp_path: Path, kind, shard):
    model = save_model(tmp_path, kind=kind, max_shard_size=shard)
    assert (len(weight_files(tmp_path)) > 1) == (shard == "20KB")
    checkpoint = Checkpoint(tmp_path)
    expected = model.state_dict()
    assert checkpoint.names() == sorted(expected)
    for name, value in expected.items():
        assert checkpoint.has(name)
        assert checkpoint.shape(name) == tuple(value.shape)
        assert torch.equal(checkpoint.tensor(name, shape=tuple(value.shape)), value)
    half = checkpoint.tensor("lm_head.weight", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    total = sum(value.numel() for value in expected.values())
    assert checkpoint.nbytes(checkpoint.names()) == 4 * total
    assert checkpoint.nbytes(checkpoint.names(), torch.bfloat16) == 2 * total


def test_missing_tensor_and_wrong_shape_name_file_and_tensor(tmp_path: Path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.has("b")
    with pytest.raises(AssetError, match=r"model\.safetensors has no tensor b"):
        checkpoint.tensor("b")
    with pytest.raises(AssetError, match=r"model\.safetensors: a has shape \[2, 3\].*\[3, 2\]"):
        checkpoint.tensor("a", shape=(3, 2))


def test_quantized_tensors_are_refused_as_floats(tmp_path: Path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensor("a").dtype == torch.int8
    with pytest.raises(AssetError, match="quantized"):
        checkpoint.tensor("a", torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 12, 100, -1])
def test_truncated_file(tmp_path: Path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AssetError, match=r"model\.safetensors is truncated"):
        Checkpoint(tmp_path)


def test_missing_shard_and_missing_everything(tmp_path: Path):
    with pytest.raises(AssetError, match="has neither"):
        Checkpoint(tmp_path)
    save_model(tmp_path, max_shard_size="20KB")
    first = weight_files(tmp_path)[0]
    first.unlink()
    with pytest.raises(AssetError, match=f"1 of .* missing, first {first.name}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "C:x.safetensors", 3, None]
    + ["a\\x.safetensors", "a\0.safetensors", "x.bin"],
)
def test_shards_stay_in_their_folder(tmp_path: Path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AssetError, match="which is no file here"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_bad_index(tmp_path: Path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(AssetError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    for value in (1.0, 2.0):
        save_tensors(path, {"a": torch.full((3, 2), value).T}, {"kind": "test"})
        assert torch.equal(load_file(path)["a"], torch.full((2, 3), value))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, ResourceError), (errno.EACCES, AssetError)]
)
def test_failed_saving_keeps_the_old_file(tmp_path: Path, monkeypatch, number, kind):
    path = tmp_path / "head.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})

    def fail(_tensors, target, _metadata):
        Path(target).write_bytes(b"half")
        raise OSError(number, "no")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(kind, match=r"head\.safetensors"):
        save_tensors(path, {"a": torch.zeros(2)}, {})
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saving_into_a_missing_folder(tmp_path: Path):
    with pytest.raises(AssetError, match="cannot write"):
        save_tensors(tmp_path / "no" / "head.safetensors", {"a": torch.ones(2)}, {})
