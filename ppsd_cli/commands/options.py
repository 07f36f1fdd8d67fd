"""Options that several commands share: annotated types, and functions where a default differs.

So a flag's name, panel and help text exist once. Ranges are checked where the values go
(``config.check``, ``bench_options.check_options``), because profiles hold some of them too.
"""

from collections.abc import Collection
from typing import Annotated, Any

import typer

from ppsd_cli.errors import ConfigError

_MODEL, _PIPE, _TOKENS = "Model", "Pipeline", "Choosing tokens"
PROMPTS, OUTPUT = "Prompts", "Output"

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", envvar="PPSD_MODEL", rich_help_panel=_MODEL,
        help="Local folder, hub id, .gguf file, or an alias such as smollm2-135m.",
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, typer.Option(rich_help_panel=_MODEL, help="Branch, tag or commit of a hub model.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="auto, float32, bfloat16 or float16. Auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline", rich_help_panel=_MODEL,
        help="Use only what is on this machine (also HF_HUB_OFFLINE=1).",
    ),
]  # fmt: skip
Context = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="Tokens of prompt and answer together. Default: the model's, at most 8192.",
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile", envvar="PPSD_PROFILE", rich_help_panel=_MODEL,
        help="Settings from profiles/ by name, or a YAML file (no profiler).",
    ),
]  # fmt: skip
ExitLayer = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="Layers of the first stage, after which tokens are guessed. Default: the head's.",
    ),
]
Stages = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="Number of stages. Default: the devices named, else the head's, else all layers "
        "over those of the first stage, else 2 (plain decoding: 1).",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PIPE, help="Layers of each stage, such as 10,12,8."),
]
Devices = Annotated[
    str | None,
    typer.Option(
        envvar="PPSD_DEVICES", rich_help_panel=_PIPE,
        help="One device for all stages (cpu, cuda:0) or one for each (cpu,cpu: a process each). "
        "Under torchrun, cuda is each rank's own GPU.",
    ),
]  # fmt: skip
Head = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="Folder of a trained draft head, the name of a shipped one, or raw (no training).",
    ),
]
DraftVocab = Annotated[
    int | None,
    typer.Option(rich_help_panel=_PIPE, help="Let a raw exit guess only among the first N tokens."),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="ppsd, eesd (draft several, then verify them at once), ar (plain; with several "
        "stages the naive split), or auto: ppsd with a head or pipeline flags, else ar.",
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="Guesses that enter per tick: 1 is a chain (the default), up to 16 a tree.",
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="Depths of a tree that enter per tick: 1 (the default), or 2 with a head that was "
        "trained with --depth 2.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(rich_help_panel=_PIPE, help="Threads of each stage. Default: its share."),
]
Port = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PIPE,
        help="Port on 127.0.0.1 where stage processes meet. Default: a free one.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(rich_help_panel=_TOKENS, help="0 is greedy (the default).")
]
TopK = Annotated[
    int | None, typer.Option(rich_help_panel=_TOKENS, help="Only the k likeliest; 0 is off.")
]
TopP = Annotated[
    float | None,
    typer.Option(rich_help_panel=_TOKENS, help="Only the likeliest that reach p together."),
]
MinP = Annotated[
    float | None,
    typer.Option(rich_help_panel=_TOKENS, help="Only those of at least p times the likeliest's."),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", "-s", rich_help_panel=_TOKENS,
        help="The same seed gives the same text with every decoder and split.",
    ),
]  # fmt: skip
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", rich_help_panel=PROMPTS, help="Go on after the end.")
]
NoChatTemplate = Annotated[
    bool,
    typer.Option("--no-chat-template", rich_help_panel=PROMPTS, help="Continue the bare text."),
]
Limit = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PROMPTS,
        help="So many of the prompts (of each task), taken evenly over their categories.",
    ),
]
JsonOutput = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="One JSON object on stdout.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", rich_help_panel=OUTPUT, help="Only the result: no progress, no notes."
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
]


def draft_length(default: str) -> Any:
    """``--draft-length`` for an annotation; the default in words."""
    text = f"Tokens that eesd drafts at a time. Default: {default}."
    return typer.Option(rich_help_panel=_PIPE, help=text)


def max_new_tokens(default: int) -> Any:
    """``--max-new-tokens`` for an annotation."""
    text = f"Tokens of an answer, at most. Default: {default}."
    return typer.Option("--max-new-tokens", "-n", rich_help_panel=PROMPTS, help=text)


def prompt_file(default: str = "") -> Any:
    """``--prompts`` for an annotation; a sentence on what is taken without it."""
    text = "Prompts of your own: JSON lines with turns or prompt, or one prompt a line."
    return typer.Option(rich_help_panel=PROMPTS, help=f"{text} {default}".rstrip())


def refuse_beside(ctx: typer.Context, flag: str, allowed: Collection[str]) -> None:
    """ConfigError where a command line has more beside ``flag`` than what is ``allowed``.

    What an environment variable says does not count: it is not meant for this one command.
    """
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if getattr(ctx.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
    others = [name for name in given if name != flag and name not in allowed]
    if others:
        verb = "has" if len(others) == 1 else "have"
        raise ConfigError(
            f"{', '.join(others)} {verb} no meaning with {flag}; drop one or the other"
        )
