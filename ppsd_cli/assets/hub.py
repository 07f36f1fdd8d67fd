"""Models of the Hugging Face hub; every failure becomes one line that says what to do."""

from pathlib import Path
from typing import Any

from ppsd_cli.errors import AssetError, PpsdError, ResourceError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*.safetensors", "*.index.fp*.json", "*.fp16.safetensors"]


def download_from_hub(
    model: str, *, revision: str | None = None, offline: bool = False, show_bars: bool = False
) -> Path:
    """Folder of the hub model ``org/name`` in the hub's own cache, downloaded unless ``offline``.

    AssetError when it does not exist, is gated, or cannot be had offline or without network.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=offline,
            **({} if show_bars else {"tqdm_class": _silent_bar()}),
        )
    except Exception as error:
        raise _explain(model, revision, offline, error) from error
    return Path(folder)


def _silent_bar() -> Any:
    import functools

    from huggingface_hub import utils

    bar: Any = utils.tqdm  # type: ignore[attr-defined]
    return type(
        "SilentBar", (bar,), {"__init__": functools.partialmethod(bar.__init__, disable=True)}
    )


def _explain(model: str, revision: str | None, offline: bool, error: Exception) -> PpsdError:
    """The user-facing error. Never quotes the hub's own text: it may hold request details."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return AssetError(f"no such model: {model!r} is neither a path nor a hub id org/name")
    if isinstance(error, errors.GatedRepoError):
        return AssetError(
            f"hub model {model} is gated: accept its terms at https://huggingface.co/{model} "
            "and log in with 'hf auth login'"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return AssetError(f"hub model {model} has no revision {revision!r}; see its 'Files' page")
    if isinstance(error, errors.RepositoryNotFoundError):
        return AssetError(
            f"no such hub model: {model}; check the name, or log in with 'hf auth login' "
            "if it is private"
        )
    if offline or isinstance(error, errors.OfflineModeIsEnabled):
        return AssetError(
            f"{model}{at} is not in the hub cache; run once without --offline and HF_HUB_OFFLINE"
        )
    if isinstance(error, OSError) and error.errno == 28:
        return ResourceError(f"no space left to download {model}; free some or set HF_HOME")
    if status is not None and status != 404:
        return AssetError(f"the hub answered {status} for {model}{at}; try again later")
    return AssetError(
        f"cannot download {model}{at} from the hub ({type(error).__name__}); check the network, "
        "or give --model a local folder or .gguf file"
    )
