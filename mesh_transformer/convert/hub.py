# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Download models from the Hugging Face Hub with the package huggingface_hub, which caches them and shows progress.

The package reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE from the environment.
"""

import re
from pathlib import Path

from mesh_transformer.config import ConfigError
from mesh_transformer.storage.errors import CheckpointError

HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# Configuration, tokenizers and weights, without the files in OTHER_WEIGHTS.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
TORCH_FILES = ("*.json", "*.bin", "*.model", "*.txt", "*.jinja")
CONFIG_FILES = ("config.json",)
OTHER_WEIGHTS = ("original/*", "consolidated*", "onnx/*", "openvino/*")  # Meta's original files, other frameworks


def download_model(name: str, *, config_only: bool = False) -> Path:
    """Return the local folder of a repository "org/model" or "org/model@revision", downloaded if it is not in the cache.

    Safetensors are preferred to .bin files; with `config_only`, only config.json is downloaded. Without network, a cached
    snapshot is used.

    Raises:
      ConfigError: huggingface_hub is not installed.
      CheckpointError: the repository or revision does not exist, access is denied, or the Hub cannot be reached and the
        model is not cached.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f'{name}: not the name of a repository on the Hub; give "org/model" or "org/model@revision"'
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise ConfigError(
            f"{name}: no such folder; to download it from the Hugging Face Hub, pip install 'mesh-transformer[hub]'"
        ) from None
    repository, revision = match["repository"], match["revision"]

    def download(files: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(files), ignore_patterns=list(OTHER_WEIGHTS)
            )
        )

    try:
        folder = download(CONFIG_FILES if config_only else FILES)
        if not config_only and not any(folder.glob("*.safetensors")):
            folder = download(TORCH_FILES)
    except GatedRepoError:
        raise CheckpointError(
            f"{repository}: this repository requires approval; request access on its page on the Hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository}: no such repository on the Hub, or it is private; check the name, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{repository}: no revision {revision!r}; give a branch, tag or commit of the repository"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repository}: not in the local cache, and the Hub cannot be reached; connect to the network, or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repository}: cannot be downloaded: {type(error).__name__}: {error}; run the command again"
        ) from None
    return folder
