"""Errors of the Hub's client, told in a line."""

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

# The HTTP library's own error, of which the client's are kinds: which library that is differs between versions.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


def reason_of(error: BaseException) -> str:
    """Why the Hub was of no use, and what to do."""
    if isinstance(error, LocalTokenNotFoundError):
        return "no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch or commit (404)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not know the token (401): log in with `hf auth login`, or set HF_TOKEN"
    if status == 412:
        return "another commit was made there in the meantime (412): publish again"
    if status == 403:
        return "the token does not allow that (403)"
    if status is not None:
        return f"the Hub answered {status}: {' '.join(str(error).split())}"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        # What the client makes of a failed upload of a large file.
        return f"{error} {reason_of(error.__cause__)}"
    return f"the Hub cannot be reached: {error}"
