"""What can go wrong between here and the Hub: which failures are tried again, and what is said of the others."""

import contextlib
import http
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import huggingface_hub as hf
from huggingface_hub import errors

__all__ = ["HubError", "check_repo_id", "first_line", "hub_errors", "is_unreachable", "retry", "status_of", "why_not"]

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class HubError(ValueError):
    """A model cannot be published or loaded; the message says what is wrong and what would be right."""


TRIES = 4
_WAIT = 1.0  # seconds before the second try; doubled for each after it
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def _client_errors(*names: str) -> tuple[type[Exception], ...]:
    """Errors of the client's HTTP library by name; the library has changed twice."""
    found = []
    for library in ("httpx2", "httpx", "requests"):
        found += [getattr(sys.modules[library], n) for n in names if hasattr(sys.modules.get(library), n)]
    return tuple(found)


def _network_errors() -> tuple[type[Exception], ...]:
    return (ConnectionError, TimeoutError, *_client_errors("TransportError", "RequestException"))


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """The client wraps what goes wrong in an upload's threads into a RuntimeError."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e.__cause__, Exception):
            raise e.__cause__ from None
        raise


def status_of(e: BaseException) -> int | None:
    return getattr(getattr(e, "response", None), "status_code", None)


def is_unreachable(e: BaseException) -> bool:
    if isinstance(e, errors.HfHubHTTPError):
        return status_of(e) in _TRANSIENT
    return isinstance(e, _network_errors())


def _is_cut_off(e: BaseException) -> bool:
    return isinstance(e, OSError) and "consistency check" in str(e).lower()


def retry(call: Callable[[], T], say: Callable[[str], Any] | None = None, tries: int = TRIES) -> T:
    """Call again, after a while, where the network or the server failed for the moment."""
    wait = _WAIT
    for left in reversed(range(tries)):
        try:
            with _unwrapped():
                return call()
        except errors.OfflineModeIsEnabled:
            raise
        except Exception as e:
            if left == 0 or not (is_unreachable(e) or _is_cut_off(e)):
                raise
            (say or _logger.warning)(f"{first_line(e)}; trying again in {wait:g} s")
        time.sleep(wait)
        wait *= 2
    raise AssertionError


def first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def why_not(e: BaseException) -> str:
    """What the Hub did instead of answering: 'cannot be reached (…)', 'answers HTTP 500 (…)', …"""
    status = status_of(e)
    if status is not None:
        meaning = {
            403: "access is forbidden: by the Hub, or by a proxy on the way",
            429: "too many requests: wait some minutes, or log in",
        }.get(status, http.HTTPStatus(status).phrase if status in http.HTTPStatus._value2member_map_ else "an error")
        return f"answers HTTP {status} ({meaning})"
    if isinstance(e, _client_errors("TooManyRedirects")):
        return "redirects without end"
    if isinstance(e, errors.OfflineModeIsEnabled) or hf.constants.HF_HUB_OFFLINE:
        return "is not asked in offline mode (HF_HUB_OFFLINE)"
    if isinstance(e, errors.FileMetadataError):
        return "does not answer as a Hub does (check HF_ENDPOINT and proxies)"
    return f"cannot be reached ({first_line(e)})"


@contextlib.contextmanager
def hub_errors(
    repo_id: str, doing: str, name: str | None = None, revision: str | None = None, because: str | None = None
) -> Iterator[None]:
    """Turn the client's errors into one sentence that says what would be right.

    Args:
        repo_id: The repository.
        doing: What is done to it: "read", "write to".
        name: The file, if it is about one.
        revision: What was asked for.
        because: Why the Hub is not asked, where that is known from before.
    """
    what = f"{name} of {repo_id}" if name else repo_id
    try:
        yield
    except HubError:
        raise
    except errors.HFValidationError as e:
        raise HubError(f"{repo_id!r} cannot be a repository's name; expected owner/name ({first_line(e)})") from e
    except errors.LocalTokenNotFoundError as e:
        raise HubError(NO_TOKEN) from e
    except errors.GatedRepoError as e:
        raise HubError(f"{repo_id} is gated: ask for access on its page, then pass a token of that account") from e
    except errors.BadRequestError as e:
        raise HubError(f"the Hub refuses the request about {what}: {first_line(e)}") from e
    except errors.RevisionNotFoundError as e:
        raise HubError(f"{repo_id} has no branch, tag or commit {revision or 'of that name'}") from e
    except errors.LocalEntryNotFoundError as e:
        why = because or why_not(e.__cause__ or e)
        raise HubError(f"{what} is not in the cache, and the Hub {why}; load it once with a connection") from e
    except errors.EntryNotFoundError as e:
        raise HubError(f"{repo_id} holds no {name}") from e
    except errors.RepositoryNotFoundError as e:
        raise HubError(
            f"there is no repository {repo_id} that this token may {doing}: check the name; a private one needs a "
            f"token of an account that has access"
        ) from e
    except errors.OfflineModeIsEnabled as e:
        raise HubError("offline mode (HF_HUB_OFFLINE) is on; publishing needs a connection") from e
    except errors.HfHubHTTPError as e:
        status = status_of(e)
        if status == 401:
            raise HubError(NO_TOKEN) from e
        if status == 403 and doing != "read":
            raise HubError(
                f"this token may not {doing} {repo_id}: it needs write permission, and the account must own "
                f"{repo_id.split('/')[0]!r} or be a member of it"
            ) from e
        if status == 403:
            raise HubError(
                f"the Hub does not let this token read {what} (HTTP 403): ask for access, or pass a token that may"
            ) from e
        raise HubError(f"the Hub refuses to {doing} {what} (HTTP {status}): {first_line(e)}") from e
    except _client_errors("TooManyRedirects") as e:
        raise HubError(f"the Hub redirects without end when asked about {what}; check HF_ENDPOINT and proxies") from e
    except _network_errors() as e:
        raise HubError(
            f"the Hub cannot be reached to {doing} {what} ({first_line(e)}); the same command continues where it was"
        ) from e
    except OSError as e:
        if not _is_cut_off(e):
            raise
        raise HubError(f"{what} arrived cut off, again and again; try later") from e
    except (*_client_errors("DecodingError"), json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:  # type: ignore[misc]
        raise HubError(
            f"the Hub's answer about {what} cannot be understood ({type(e).__name__}: {first_line(e)}); check "
            f"HF_ENDPOINT and proxies"
        ) from e
    except ValueError as e:  # of the client, about what it was told or what the card holds
        raise HubError(f"the Hub's client refuses to {doing} {what}: {' '.join(str(e).split()):.300}") from e


NO_TOKEN = (
    "the Hub needs an access token that may write: make one at https://huggingface.co/settings/tokens, then run "
    "`hf auth login`, set HF_TOKEN, or pass token (--token)"
)


def check_repo_id(repo_id: str) -> None:
    try:
        hf.utils.validate_repo_id(repo_id)
    except errors.HFValidationError as e:
        raise HubError(f"{repo_id!r} cannot be a repository's name: {first_line(e)}") from None
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} cannot be a repository's name; expected owner/name")
