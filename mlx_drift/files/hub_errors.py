"""What goes wrong with the Hub, in one line that says what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # it exports lazily

from mlx_drift.errors import DriftError


@contextmanager
def one_line(
    subject: str, repo: str, revision: str | None = None, access: str = "read"
) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into a single line about the subject."""
    try:
        yield
    except DriftError:
        raise
    except Exception as error:  # its exceptions, httpx's, xet's and the disk's share no other base
        reason = _reason(_cause(error), repo, revision, access)
        raise DriftError(f"{subject}: {reason}") from None


def _cause(error: Exception) -> Exception:
    """Returns why the Hub was not asked, of an error that only says that the cache lacks it."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    return cause if isinstance(cause, Exception) else error


def _reason(error: Exception, repo: str, revision: str | None, access: str) -> str:
    """Says what went wrong and what to do about it."""
    hub = f"the Hub at {constants.ENDPOINT}"
    reading = access == "read"
    missing = "it is neither here nor in the local cache, and " if reading else ""
    match error:
        case GatedRepoError():
            return (
                f"it is gated: accept the terms at {constants.ENDPOINT}/{repo}, then log in with "
                "`hf auth login`"
            )
        case RevisionNotFoundError():
            return f"the Hub has no revision {revision!r} of it"
        case RemoteEntryNotFoundError():
            return "the Hub has no such file"
        case RepositoryNotFoundError() if reading:
            return (
                "no such folder here and no such repository on the Hub, or a private one: check "
                "the name, or log in with `hf auth login`"
            )
        case HfHubHTTPError():
            return f"{hub} {_refusal(error, access)}"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            return f"{missing}HF_HUB_OFFLINE is set: check the name, or go online"
        case (
            httpx.ConnectError()
            | httpx.ConnectTimeout()
            | httpx.ProxyError()
            | httpx.UnsupportedProtocol()
        ):
            return (
                f"{missing}{hub} cannot be reached ({_line(error)}): check the name, the "
                "connection and HF_ENDPOINT"
            )
        case httpx.TransportError() | ConnectionError() | TimeoutError():
            return (
                f"the connection to {hub} broke off ({_line(error)}): run it again; files that "
                "arrived whole are kept"
            )
        case OSError(errno=int()) if reading:
            return (
                f"{error.strerror} ({error.filename or constants.HF_HUB_CACHE}): make room or get "
                "access there, or set HF_HOME to another folder"
            )
    return f"{hub} gave no usable answer ({_line(error)})"


def _refusal(error: HfHubHTTPError, access: str) -> str:
    status = error.response.status_code
    said = f"HTTP {status}" + (f": {_line(error.server_message)}" if error.server_message else "")
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return (
            f"does not let you {access} it ({said}): log in with `hf auth login`, or set HF_TOKEN, "
            f"with a token that may {access} it"
        )
    later = "; try again later" if status == 429 or status >= 500 else ""
    return f"answered with {said}{later}"


def _line(message: object) -> str:
    """Returns the first line of a message that others wrote."""
    text = str(message).strip() or type(message).__name__
    return text.splitlines()[0][:200]
