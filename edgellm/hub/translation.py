"""What ``huggingface_hub`` raises, as ``HubError`` with the next step."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from edgellm.errors import HubError
from edgellm.hub.ids import HubId

SIGN_IN = "run `hf auth login` or set HF_TOKEN"
WRITE_TOKEN = "a token with write permission (https://huggingface.co/settings/tokens)"


def _failures() -> tuple[type[BaseException], ...]:
    from huggingface_hub import errors

    # The first base is the HTTP library's own root of errors (httpx's, whose name has changed
    # between versions); an OSError is a broken connection or a full disk.
    root: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    return (root, OSError, errors.HFValidationError)


def unreachable(error: BaseException | None) -> bool:
    """Whether the connection failed, as opposed to an answer that says no."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what the library would log on stderr, unless the user asked for it."""
    from huggingface_hub.utils import logging as library

    level = library.get_verbosity()
    if "HF_HUB_VERBOSITY" not in os.environ:
        library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(level)


@contextmanager
def fetching(wanted: HubId) -> Iterator[None]:
    """Translate what goes wrong while ``wanted`` is fetched."""
    from huggingface_hub import errors

    at = f"revision {wanted.revision} of {wanted.repo}" if wanted.revision else wanted.repo
    try:
        with quietly():
            yield
    except errors.GatedRepoError as error:
        raise HubError(_gated(wanted)) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"neither a file or folder {wanted.repo} here nor a model of that name on the Hub: "
            f"check the spelling at {wanted.url}; if it is private, {SIGN_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"the Hub has no {at}: see {wanted.url}/commits for those there are"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"{at} is not in the cache and HF_HUB_OFFLINE forbids to fetch it: unset "
            "HF_HUB_OFFLINE, or give a folder"
        ) from error
    except _failures() as error:
        if _status(error) == 401:
            raise HubError(_refused_token()) from error
        raise HubError(
            f"{at} could not be fetched from the Hub ({_reason(error)}): check the connection and "
            "run the same command again; files that have arrived whole are kept"
        ) from error


@contextmanager
def publishing(target: HubId) -> Iterator[None]:
    """Translate what goes wrong while something is uploaded to ``target``."""
    from huggingface_hub import errors

    repo = target.repo
    owner = repo.partition("/")[0]
    # RuntimeError: how the library says that one of several uploads failed. ValueError: an answer
    # that it does not understand, or a card that the Hub does not accept.
    failures: tuple[type[BaseException], ...] = (*_failures(), RuntimeError, ValueError)
    try:
        with quietly():
            yield
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub lets this token neither see nor make {repo}: check the name, and that the "
            f"token is {WRITE_TOKEN} of a member of {owner}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"the Hub has no revision {target.revision} of {repo}: see {target.url}/commits"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"{repo} cannot be uploaded while HF_HUB_OFFLINE is set: unset it, or look at what "
            "would be uploaded with --dry-run"
        ) from error
    except failures as error:
        status = _status(error)
        if status == 401:
            raise HubError(_refused_token()) from error
        if status == 403:
            raise HubError(
                f"the Hub does not let this token write to {repo}: give {WRITE_TOKEN} of a member "
                f"of {owner}"
            ) from error
        if isinstance(error, ValueError) and "metadata" in str(error):
            raise HubError(
                f"the Hub does not accept the card ({_reason(error)}): --license and --base-model "
                "set what it says of the source"
            ) from error
        raise HubError(
            f"{repo} could not be uploaded ({_reason(error)}): the files appear there together at "
            "the end, so what is there is as it was; run the same command again"
        ) from error


def _gated(wanted: HubId) -> str:
    """What to do about a gated repository, by whether there is a token."""
    from huggingface_hub import get_token

    if get_token() is None:
        return (
            f"{wanted.repo} is gated and no token is set: accept its terms at {wanted.url} with "
            f"your account, make a token at https://huggingface.co/settings/tokens, then {SIGN_IN}"
        )
    return (
        f"{wanted.repo} is gated and the token that is set has no access to it: accept its terms "
        f"at {wanted.url} with the token's account (some are granted by hand, and take a while), "
        "and let the token read gated repositories (https://huggingface.co/settings/tokens)"
    )


def _refused_token() -> str:
    return f"the Hub does not accept the token that is set (expired, revoked?): {SIGN_IN} anew"


def _status(error: BaseException) -> int | None:
    """The HTTP status in ``error`` or in what it was raised from."""
    from huggingface_hub.errors import HfHubHTTPError

    looked: BaseException | None = error
    while looked is not None:
        if isinstance(looked, HfHubHTTPError):
            status: int = looked.response.status_code
            return status
        looked = looked.__cause__
    return None


def _reason(error: BaseException) -> str:
    """The lines of ``error`` that say most, and of what it was raised from."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(said[:3]) or type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{reason} {_reason(error.__cause__)}"
    return reason
