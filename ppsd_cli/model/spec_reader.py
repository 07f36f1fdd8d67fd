"""Read a ``ModelSpec`` and the end-of-text ids from a model folder: plain JSON, no transformers.

Defaults for absent keys are those of transformers' config classes, the reference of our tests.
"""

import json
import math
from pathlib import Path
from typing import Any

from ppsd_cli.errors import AssetError
from ppsd_cli.model.spec import ModelSpec, RopeScaling

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
_QWEN3_HEAD_DIM = 128
_NEUTRAL_PENALTIES = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; AssetError when it is missing, not UTF-8 or not an object."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise AssetError(f"{path} is missing; give a complete transformers model folder") from error
    except OSError as error:
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise AssetError(f"{path} is not UTF-8 (byte {error.start}); download it again") from error
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise AssetError(f"{path} is not valid JSON{where}; download it again") from error
    if not isinstance(value, dict):
        raise AssetError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_spec(folder: Path) -> ModelSpec:
    """The spec in ``folder/config.json``; AssetError when it is missing, bad or unsupported."""
    path = folder / "config.json"
    return spec_from_config(read_json(path), str(path))


def spec_from_config(config: dict[str, Any], where: str) -> ModelSpec:
    """Turn a transformers config (as a dict) into a spec; ``where`` names it in errors."""
    keys = _Keys(config, where)
    architecture = keys.text("model_type")
    if architecture not in SUPPORTED:
        keys.fail(
            f"model_type {architecture!r} is not supported; use one of {', '.join(SUPPORTED)}"
        )
    _refuse_variants(keys)
    layers, hidden, heads = (
        keys.count(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    kv_heads = keys.count("num_key_value_heads", heads)
    if heads % kv_heads:
        keys.fail(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    context = keys.count("max_position_embeddings")
    theta, scaling = _rope(keys, context)
    attention_bias = architecture in ("llama", "qwen3") and keys.flag("attention_bias")
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=keys.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(keys, architecture, hidden, heads),
        vocabulary=keys.count("vocab_size"),
        rms_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        context=context,
        tied=keys.flag("tie_word_embeddings"),
        windows=_windows(keys, architecture, layers),
        rope_scaling=scaling,
        qkv_bias=architecture == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=architecture == "llama" and keys.flag("mlp_bias"),
        qk_norm=architecture == "qwen3",
    )


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """End-of-text ids from generation_config.json (one or a list), else from config.json.

    Empty when neither names one.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if name != "config.json" and not path.exists():
            continue
        value = read_json(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(one) is int and one >= 0 for one in ids):
            raise AssetError(f"{path}: eos_token_id must be an id or a list of ids, not {value!r}")
        return tuple(dict.fromkeys(ids))
    return ()


def generation_warnings(folder: Path) -> list[str]:
    """At most one line: the penalties of generation_config.json, which decoding ignores."""
    path = folder / "generation_config.json"
    if not path.exists():
        return []
    config = read_json(path)
    ignored = [
        f"{name}={config[name]}"
        for name, neutral in _NEUTRAL_PENALTIES.items()
        if config.get(name) is not None and config[name] != neutral
    ]
    return [f"generation_config.json asks for {', '.join(ignored)}: ignored"] if ignored else []


class _Keys:
    """Typed access to a config dict; a missing or garbled key is an AssetError."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def fail(self, message: str) -> None:
        raise AssetError(f"{self.where}: {message}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of ``name``; absent and null both give the default, or fail without one."""
        value = self.config.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{name} is missing; give the model's own config.json")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            self.fail(f"{name} must be text, not {value!r}")
        return str(value)

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            self.fail(f"{name} must be a whole number of at least 1, not {value!r}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        bad = isinstance(value, bool) or not isinstance(value, int | float)
        if bad or not math.isfinite(value) or value <= 0:
            self.fail(f"{name} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.fail(f"{name} must be true or false, not {value!r}")
        return bool(value)


def _refuse_variants(keys: _Keys) -> None:
    """Variants that the layers do not compute: fail rather than compute something else."""
    if keys.config.get("quantization_config") is not None:
        keys.fail("quantized checkpoints are not supported; use the unquantized model or a .gguf")
    activation = keys.text("hidden_act", "silu")
    if activation != "silu":
        keys.fail(f"hidden_act {activation!r} is not supported; only 'silu' is")


def _head_dim(keys: _Keys, architecture: str, hidden: int, heads: int) -> int:
    default = _QWEN3_HEAD_DIM if architecture == "qwen3" else hidden // heads
    if keys.config.get("head_dim") is None and architecture != "qwen3" and hidden % heads:
        keys.fail(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = keys.count("head_dim", default)
    if head_dim % 2:
        keys.fail(f"head_dim {head_dim} is odd; rotary embedding needs an even one")
    return head_dim


def _windows(keys: _Keys, architecture: str, layers: int) -> tuple[int | None, ...]:
    """One sliding window (tokens, the query's own included) or None for each layer."""
    explicit_none = keys.config.get("sliding_window", _DEFAULT_WINDOW) is None
    used = architecture == "mistral" or (
        architecture != "llama" and keys.flag("use_sliding_window")
    )
    if not used or explicit_none:
        return (None,) * layers
    window = keys.count("sliding_window", _DEFAULT_WINDOW)
    if architecture == "mistral":
        return (window,) * layers
    kinds = keys.config.get("layer_types")
    if kinds is not None:
        return _windows_by_kind(keys, kinds, layers, window)
    first = keys.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if type(first) is not int or first < 0:
        keys.fail(f"max_window_layers must be a whole number, not {first!r}")
    return tuple(window if layer >= first else None for layer in range(layers))


def _windows_by_kind(keys: _Keys, kinds: Any, layers: int, window: int) -> tuple[int | None, ...]:
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, list) or len(kinds) != layers:
        keys.fail(f"layer_types must name the kind of each of the {layers} layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            keys.fail(f"layer type {kind!r} is not supported; use {' or '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _rope(keys: _Keys, context: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from ``rope_parameters`` or the older ``rope_theta``/``rope_scaling``."""
    rope = _Keys(_rope_parameters(keys), keys.where)
    theta = rope.number("rope_theta", keys.number("rope_theta", 10_000.0))
    partial = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        keys.fail(f"partial_rotary_factor {partial} is not supported; only 1.0 is")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    if kind != "llama3":
        keys.fail(f"rope scaling {kind!r} is not supported; use default, linear or llama3")
    scaling = RopeScaling(
        "llama3",
        rope.number("factor"),
        rope.count("original_max_position_embeddings", context),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
    )
    if scaling.high <= scaling.low:
        keys.fail(f"high_freq_factor {scaling.high} must exceed low_freq_factor {scaling.low}")
    return theta, scaling


def _rope_parameters(keys: _Keys) -> dict[str, Any]:
    """The one rope dict of a config; a dict per layer type is accepted when all are equal."""
    for name in ("rope_parameters", "rope_scaling"):
        value = keys.config.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            keys.fail(f"{name} must be an object, not {value!r}")
        kinds = [part for part in value.values() if isinstance(part, dict)]
        if not kinds:
            return dict(value)
        if len(kinds) != len(value) or any(part != kinds[0] for part in kinds):
            keys.fail(f"{name} that differ between layers are not supported")
        return dict(kinds[0])
    return {}
