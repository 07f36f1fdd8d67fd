"""Specs from config.json: equal to what transformers makes of it, or an error that says why not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppsd_cli.errors import AssetError
from ppsd_cli.model.spec import RopeScaling
from ppsd_cli.model.spec_reader import (
    generation_warnings,
    read_eos_ids,
    read_spec,
    spec_from_config,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def spec(**changes: Any):
    return spec_from_config({**LLAMA, **changes}, "config.json")


def test_llama_by_hand():
    found = spec(tie_word_embeddings=True)
    assert (found.layers, found.hidden, found.intermediate, found.vocabulary) == (4, 32, 64, 128)
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 8)
    assert (found.rope_theta, found.rms_eps, found.context, found.tied) == (5e5, 1e-5, 256, True)
    assert found.windows == (None,) * 4
    assert found.rope_scaling is None
    assert [found.qkv_bias, found.output_bias, found.mlp_bias, found.qk_norm] == [False] * 4


def test_biases_and_norms_follow_the_architecture():
    llama = spec(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.qk_norm) == (
        (True,) * 3 + (False,)
    )
    qwen2 = spec(model_type="qwen2", attention_bias=True)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = spec(model_type="qwen3", head_dim=16, attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (True, True, True)
    assert qwen3.head_dim == 16
    assert spec(model_type="qwen3").head_dim == 128  # transformers' default, not hidden / heads


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "qwen2", "sliding_window": 8}, (None,) * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 8),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
        ({"sliding_window": 8}, (None,) * 4),
    ],
)
def test_windows(changes, windows):
    assert spec(**changes).windows == windows


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": None}, 1e4, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 5e5, RopeScaling("linear", 2.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            5e5,
            RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}},
            7.0,
            None,
        ),
    ],
)
def test_rope_old_and_new(changes, theta, scaling):
    found = spec(**changes)
    assert (found.rope_theta, found.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "whole number"),
        ({"num_hidden_layers": True}, "whole number"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "no multiple"),
        ({"head_dim": 7}, "odd"),
        ({"rms_norm_eps": float("nan")}, "positive number"),
        ({"rope_theta": -1}, "positive number"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}, "differ"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3_ROPE, "high_freq_factor": 1.0}},
            "must exceed",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["chunked_attention"] * 4,
            },
            "'chunked_attention'",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"],
            },
            "each of the 4 layers",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, words):
    with pytest.raises(AssetError, match="^config.json: ") as caught:
        spec(**changes)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
        (b'{"model_type": ', "not valid JSON (line 1)"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(AssetError) as caught:
        read_spec(tmp_path)
    assert words in str(caught.value)


def test_eos_ids(tmp_path: Path):
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert read_eos_ids(tmp_path) == (2,)
    generation.write_text(json.dumps({"eos_token_id": [5, 6, 5]}))
    assert read_eos_ids(tmp_path) == (5, 6)
    generation.write_text(json.dumps({"eos_token_id": 0}))
    assert read_eos_ids(tmp_path) == (0,)
    generation.write_text(json.dumps({}))
    assert read_eos_ids(tmp_path) == (2,)
    config.write_text(json.dumps(LLAMA))
    assert read_eos_ids(tmp_path) == ()
    generation.write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(AssetError, match="eos_token_id"):
        read_eos_ids(tmp_path)


def test_ignored_penalties_give_one_line(tmp_path: Path):
    assert generation_warnings(tmp_path) == []
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 1.0, "temperature": 0.7}))
    assert generation_warnings(tmp_path) == []
    path.write_text(json.dumps({"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}))
    (line,) = generation_warnings(tmp_path)
    assert "repetition_penalty=1.1" in line
    assert "no_repeat_ngram_size=3" in line


def test_equals_what_transformers_saves(tmp_path: Path):
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    shape = {key: value for key, value in LLAMA.items() if key not in ("model_type", "rope_theta")}
    llama3 = {"rope_type": "llama3", "rope_theta": 3e5, **LLAMA3_ROPE}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    for kind, extra in (
        (LlamaConfig, {"rope_parameters": llama3, "tie_word_embeddings": True}),
        (MistralConfig, {"sliding_window": 8}),
        (Qwen2Config, windows),
        (Qwen3Config, {**windows, "head_dim": 16}),
    ):
        config = kind(**shape, **extra)
        config.save_pretrained(tmp_path)
        found = read_spec(tmp_path)
        assert found.architecture == config.model_type
        assert found.tied == config.tie_word_embeddings
        assert found.rope_theta == config.rope_parameters["rope_theta"]
        assert found.head_dim == (getattr(config, "head_dim", None) or 8)
        if kind is LlamaConfig:
            assert found.rope_scaling == RopeScaling("llama3", 8.0, 64, 1.0, 4.0)
            assert found.windows == (None,) * 4
        elif kind is MistralConfig:
            assert found.windows == (8,) * 4
        else:
            assert found.windows == (None, None, 8, 8)


def test_reading_specs_loads_no_torch():
    code = "import sys, ppsd_cli.model.spec_reader, ppsd_cli.assets; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "gguf", "huggingface_hub"} & set(done.stdout.split())
