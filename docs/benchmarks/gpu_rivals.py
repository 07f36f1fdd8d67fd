"""transformers on this GPU: `generate`, and `generate` with `assistant_early_exit`, bfloat16.

Milliseconds per token after the first, to be set beside `gpu_engine.py` on the same machine.

    python docs/benchmarks/gpu_rivals.py --model FOLDER --exit-layer 10
    python docs/benchmarks/gpu_rivals.py --shape llama-8b --exit-layer 16
"""

import argparse
import json
import statistics
import sys
import warnings
from time import perf_counter

import torch
from cpu_pipeline import PROMPTS

from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.tasks.bench.prompts import encode_without_tokenizer


def load(options: argparse.Namespace):
    """The model, with weights of its folder or random ones of a named shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        return model.to("cuda").eval()
    spec = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        vocab_size=spec.vocabulary,
        tie_word_embeddings=spec.tied,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def token_ms(model, prompt: tuple[int, ...], tokens: int, **extra) -> float:
    """Milliseconds per token after the first."""
    ids = torch.tensor([prompt], device="cuda")
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **extra}
    spent = []
    for count in (1, tokens):
        torch.cuda.synchronize()
        begin = perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **settings)
        torch.cuda.synchronize()
        spent.append(perf_counter() - begin)
    return 1e3 * (spent[1] - spent[0]) / (tokens - 1)


def main() -> None:
    """Run and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--exit-layer", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load(options)
    prompts = [
        encode_without_tokenizer(4 * text, model.config.vocab_size)
        for text in PROMPTS[: options.prompts]
    ]
    report = {
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    ways = {"generate": {}, "early_exit": {"assistant_early_exit": options.exit_layer}}
    for name, extra in ways.items():
        with torch.inference_mode():
            token_ms(model, prompts[0], 4, **extra)
            times = [token_ms(model, prompt, options.tokens, **extra) for prompt in prompts]
        report[name] = statistics.median(times)
        sys.stderr.write(f"{name} {report[name]}\n")
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
