"""Fetch a pipeline from the hub: once, and without waiting long for a hub that does not answer."""

from pathlib import Path

from dicache.models.folders import convert
from dicache.models.names import ModelError

SECONDS_TO_ANSWER = 10  # that the hub has; its own client waits for minutes, and tries again


def fetch(repository: str, name: str) -> Path:
    """Return the folder of a repository's snapshot, downloaded unless it is there already.

    Only safetensors weights are downloaded. Where the hub does not answer, what an earlier download left is taken.

    Args:
        repository: Hub id.
        name: How the user calls the model, for messages.

    Raises:
        ModelError: If there is no such repository, it is gated, it has no safetensors weights, or it is neither
            reachable nor on this machine.
    """
    import diffusers
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    unreachable: Exception | None = None
    try:
        files = {s.rfilename for s in HfApi().model_info(repository, timeout=SECONDS_TO_ANSWER).siblings or ()}
    except GatedRepoError:
        raise _gated(name, repository) from None
    except RepositoryNotFoundError:
        folder_too = "" if name != repository else f" nor a folder {name} here"
        raise ModelError(
            f"{name}: there is no repository {repository} on the hub{folder_too}; check the id, and `hf auth login` "
            "if it is private"
        ) from None
    except Exception as error:  # the clients of the hub's versions raise errors of different libraries
        unreachable = error
    else:
        if "model_index.json" not in files:
            raise ModelError(f"{name}: {repository} has no model_index.json; needed a pipeline in diffusers' format")
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(
                f"{name}: {repository} has no safetensors weights, and others are not read, because they can run code. "
                + convert(repository)
            )
    try:
        folder = diffusers.DiffusionPipeline.download(
            repository, use_safetensors=True, trust_remote_code=False, local_files_only=unreachable is not None
        )
    except GatedRepoError:
        raise _gated(name, repository) from None
    except Exception as error:
        if unreachable is None and not isinstance(error, HfHubHTTPError):
            raise ModelError(f"{name}: cannot load {repository}: {first_line(error)}") from error
        why = unreachable or error
        folder_too = "" if name != repository else f", nor is there a folder {name}"
        raise ModelError(
            f"{name}: cannot get {repository} from the hub ({type(why).__name__}: {first_line(why)[:80]}), and it is "
            f"not on this machine{folder_too}. Without a network, bring what `hf download {repository}` fetches "
            "elsewhere and pass that folder as --model"
        ) from why
    return Path(folder)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _gated(name: str, repository: str) -> ModelError:
    return ModelError(
        f"{name}: {repository} is gated; accept its licence at https://huggingface.co/{repository}, then log in "
        "with `hf auth login`"
    )
