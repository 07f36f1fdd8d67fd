"""The JSON object of ``generate``; docs/json.md describes it, a schema file checks it."""

import platform
from typing import TYPE_CHECKING, Any

import torch

from ppsd_cli import __version__
from ppsd_cli.commands.session import Plan
from ppsd_cli.core.events import FinishReason
from ppsd_cli.core.stats import RunStats
from ppsd_cli.tasks.bench.environment import cpu_name

if TYPE_CHECKING:
    from ppsd_cli.commands.answer_output import Answer

SCHEMA_VERSION = 1


def answer_report(
    answer: "Answer", stats: RunStats, plan: Plan, text: str, *, seed: int
) -> dict[str, Any]:
    """One run as plain data."""
    config = plan.config
    reason = FinishReason.FAILED if answer.error is not None else answer.reason
    return {
        "schema_version": SCHEMA_VERSION,
        "text": text,
        "token_ids": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": reason.value,
        "incomplete": reason in (FinishReason.FAILED, FinishReason.INTERRUPTED),
        "error": None if answer.error is None else str(answer.error),
        "model": plan.files.name,
        "model_hash": plan.files.model_hash,
        "decoder": plan.decoder,
        "seed": seed,
        "exit_layer": None if plan.decoder == "ar" else config.split[0],
        "split": list(config.split),
        "devices": list(config.devices),
        "dtype": config.dtype,
        "width": config.width,
        "depth": config.depth,
        "head": plan.head_name,
        "draft_length": plan.draft_length or None,
        "ticks": stats.ticks,
        "verified": stats.verified,
        "accepted": stats.accepted,
        "void_drafts": stats.void_drafts,
        "acceptance_rate": stats.acceptance_rate,
        "flushes": stats.flushes,
        "tokens_per_tick": stats.tokens_per_tick,
        "nodes_per_tick": stats.nodes_per_feed if plan.decoder == "ppsd" else None,
        "bursts": stats.feeds if plan.draft_length else None,
        "accepted_runs": [list(run) for run in stats.runs],
        "stage_busy_fraction": stats.stage_busy_fraction,
        "tick_seconds": stats.tick_seconds,
        "stage_seconds": [each.median for each in stats.stage_seconds],
        "prefill_seconds": None if answer.first is None else answer.first - answer.began,
        "decode_seconds": _span(answer),
        "tokens_per_second": answer.tokens_per_second,
        "versions": versions(),
        "hardware": hardware(config.devices, config.threads),
    }


def versions() -> dict[str, str]:
    """What ran."""
    return {
        "ppsd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def hardware(devices: tuple[str, ...], threads: int) -> dict[str, Any]:
    """Where it ran."""
    cuda = sorted({d for d in devices if d.startswith("cuda")})
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads_per_stage": threads,
        "gpus": [torch.cuda.get_device_name(d) for d in cuda],
    }


def _span(answer: "Answer") -> float | None:
    if answer.first is None or answer.last is None:
        return None
    return answer.last - answer.first
