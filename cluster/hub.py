"""Models of the Hugging Face hub, brought to this machine."""

from __future__ import annotations

from pathlib import Path

HUB = "hub:"  # before OWNER/NAME
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.npy"]
WEIGHTS = ["*.safetensors"]


def fetch(what: str, revision: str | None = None, weights: bool = True) -> Path:
    """A folder with the files of hub:OWNER/NAME that a model is read from, named after their commit; `weights` says
    whether those are among them. Raises ValueError that says what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    wanted = SMALL_FILES + WEIGHTS * weights
    try:
        return Path(snapshot_download(what.removeprefix(HUB), revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(
            f"{what} cannot be downloaded: {' '.join(str(error).split())}; check the name (hub:OWNER/NAME) and the "
            "network, set HF_TOKEN for a gated model, or give its directory instead"
        ) from error
