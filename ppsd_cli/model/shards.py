"""Which safetensors files of a folder hold the weights; needs no torch."""

from pathlib import Path

from ppsd_cli.errors import AssetError
from ppsd_cli.model.spec_reader import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shard_of_tensor(folder: Path) -> dict[str, str]:
    """Map tensor name to shard file name, from the index; AssetError when it is bad.

    Shard names must be plain file names, so that a model cannot name files outside its folder.
    """
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AssetError(f"{path} has no weight_map; download the model again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise AssetError(f"{path}: {name} is said to be in {shard!r}, which is no file here")
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """The existing weight files, sorted; ``model.safetensors`` wins over an index.

    AssetError when there are none or a shard is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise AssetError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors are read")
    files = [folder / shard for shard in sorted(set(shard_of_tensor(folder).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise AssetError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}; "
            "download the model again"
        )
    return files


def _is_plain(name: str) -> bool:
    separators = "/" in name or "\\" in name or ":" in name or "\0" in name
    return not separators and name.endswith(".safetensors") and not name.startswith(".")
