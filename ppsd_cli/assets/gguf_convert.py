"""A .gguf file as a transformers folder in float32, converted once and kept in the cache."""

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppsd_cli.assets.cache import cache_folder, locked, publish, scratch_folder, storage_error
from ppsd_cli.assets.gguf_header import GgufHeader, read_gguf_header
from ppsd_cli.errors import AssetError, ResourceError
from ppsd_cli.model.shards import SINGLE, weight_files
from ppsd_cli.model.spec_reader import SUPPORTED, read_json, read_spec

Progress = Callable[[str], None]
_SPARE_BYTES = 64 << 20  # tokenizer and configuration
_DROPPED = ("quantization_config", "_name_or_path", "_model_name_or_path")


def convert_gguf(path: Path, digest: str, *, progress: Progress | None = None) -> Path:
    """Folder with the float32 form of ``path``, whose sha256 is ``digest``.

    AssetError when the file is bad, of an unsupported architecture, or uses something that the
    conversion would silently lose; ResourceError when disk or memory do not suffice.
    """
    place = cache_folder() / "models" / f"{digest[:16]}-fp32"
    if place.is_dir():
        return place
    header = read_gguf_header(path)
    _check_meaning(path, header)
    with locked(place):
        if place.is_dir():
            return place
        _expect_space(place, header)
        if progress is not None:
            progress(f"converting {path.name} to float32 (once)")
        with scratch_folder(place) as scratch:
            _convert(path, scratch, show_bars=progress is not None)
            publish(scratch, place)
    return place


def _check_meaning(path: Path, header: GgufHeader) -> None:
    """Refuse what the layers cannot compute and what the conversion does not carry over."""
    values, shapes = header.values, header.shapes
    architecture = values.get("general.architecture")
    if architecture not in SUPPORTED:
        raise AssetError(
            f"{path}: architecture {architecture!r} is not supported; use one of "
            f"{', '.join(SUPPORTED)}"
        )
    lost = []
    if values.get(f"{architecture}.rope.scaling.type", "none") != "none":
        lost.append("rope scaling")
    if "rope_freqs.weight" in shapes:
        lost.append("rope frequency factors")
    if values.get(f"{architecture}.attention.sliding_window"):
        lost.append("a sliding window")
    if lost:
        raise AssetError(
            f"{path} uses {' and '.join(lost)}, which GGUF conversion would lose; "
            "use the model's safetensors folder"
        )
    _check_sizes(path, header, str(architecture))


def _check_sizes(path: Path, header: GgufHeader, architecture: str) -> None:
    """Sizes in the key-value section must be those of the tensors: models are built from them."""
    values, shapes = header.values, header.shapes
    embedding = shapes.get("token_embd.weight", ())
    up = shapes.get("blk.0.ffn_up.weight", ())
    query = shapes.get("blk.0.attn_q.weight", ())
    if len(embedding) != 2 or len(up) != 2 or len(query) != 2:
        raise AssetError(f"{path} lacks weights of a {architecture} model; download it again")
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    heads = values.get(f"{architecture}.attention.head_count")
    if type(heads) is not int or heads < 1 or query[1] % heads:
        raise AssetError(f"{path}: {architecture}.attention.head_count {heads!r} cannot be right")
    head_dim = query[1] // heads
    expected = {
        "block_count": (blocks,),
        "embedding_length": (embedding[0],),
        "feed_forward_length": (up[1],),
        "vocab_size": (embedding[1], None),
        "rope.dimension_count": (head_dim, None),
        "attention.key_length": (head_dim, None),
        "attention.value_length": (head_dim, None),
    }
    for key, allowed in expected.items():
        value = values.get(f"{architecture}.{key}")
        if value not in allowed:
            raise AssetError(
                f"{path}: {architecture}.{key} is {value!r}, but the tensors say {allowed[0]}"
            )


def _expect_space(place: Path, header: GgufHeader) -> None:
    needed = 4 * header.elements() + _SPARE_BYTES
    try:
        free = shutil.disk_usage(place.parent).free
    except OSError as error:
        raise storage_error(place.parent, error) from error
    if free < needed:
        raise ResourceError(
            f"converting to float32 needs {needed / 1e9:.1f} GB in {place.parent}, "
            f"{free / 1e9:.1f} GB are free; free some or set PPSD_CACHE elsewhere"
        )


def _convert(path: Path, target: Path, *, show_bars: bool) -> None:
    """Load with transformers and save to ``target``; whatever fails is the file's fault."""
    try:
        with _quiet(show_bars):
            lost = _load_and_save(path, target)
            _clean_config(target / "config.json")
    except ResourceError:
        raise
    except MemoryError as error:
        raise ResourceError(f"not enough memory to convert {path}") from error
    except Exception as error:
        if "No space left" in str(error):
            raise ResourceError(
                f"no space left in {target.parent}; free some or set PPSD_CACHE elsewhere"
            ) from error
        reason = (str(error).splitlines() or [""])[0][:200]
        raise AssetError(f"cannot convert {path}: {type(error).__name__}: {reason}") from error
    if lost:
        raise AssetError(f"{path} lacks {len(lost)} weights, first {lost[0]}; download it again")
    read_spec(target)
    weight_files(target)


def _load_and_save(path: Path, target: Path) -> list[str]:
    """Returns the weights that the model needs and the file does not have."""
    import torch
    import transformers

    from ppsd_cli.model.weights import save_tensors  # here, because it loads torch

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.absolute().parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep weights packed otherwise
        place["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32, output_loading_info=True
    )
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    if model.config.tie_word_embeddings:
        tied.add("lm_head.weight")
    # Not model.save_pretrained, which refuses anything that came from a GGUF file.
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    save_tensors(target / SINGLE, state, {"format": "pt"})
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return sorted(set(report["missing_keys"]) - tied)


def _clean_config(path: Path) -> None:
    """Drop what describes the file the weights came from rather than the model."""
    config = {key: value for key, value in read_json(path).items() if key not in _DROPPED}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet(show_bars: bool) -> Iterator[None]:
    """No warnings, and no progress bars unless wanted, from the libraries."""
    import tqdm.auto
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    original = reader.tqdm
    logging.set_verbosity_error()
    if not show_bars:
        logging.disable_progress_bar()
        reader.tqdm = lambda *args, **kwargs: tqdm.auto.tqdm(*args, **{**kwargs, "disable": True})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reader.tqdm = original
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
