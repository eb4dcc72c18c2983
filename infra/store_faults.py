"""What goes wrong between us and the object store, said so that the reader knows what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from urllib3.exceptions import HTTPError

from hydraopt.errors import DeniedError, ServiceError

_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_REFUSED |= {"AllAccessDisabled", "AccountProblem", "Forbidden", "Unauthorized", "401", "403"}
_OUT_OF_TIME = {"RequestTimeTooSkewed", "RequestExpired"}
INTERRUPTED = (
    HTTPClientError,
    NoConnectionError,
    IncompleteReadError,
    FlexibleChecksumError,
    HTTPError,
    ConnectionError,
    TimeoutError,
)
"""Errors of a connection that broke or never came to be, as boto3 and the stream below it raise them."""

_SAFE = "what was stored before is whole and stays"


def code_of(error: ClientError) -> str:
    """The store's own word for what is wrong, such as ``PreconditionFailed``; HEAD gives a number only."""
    return str(error.response.get("Error", {}).get("Code", "")) or str(status_of(error))


def status_of(error: ClientError) -> int:
    """The HTTP status of an answer that is an error."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def told_plainly(address: str, bucket: str, doing: str) -> Iterator[None]:
    """Turn every error of the object store's client into a ServiceError without any secret.

    Args:
        address: The store's address, as the user gave it.
        bucket: The bucket in use.
        doing: What was being done, such as "reading bundles/chat/...".
    """
    try:
        yield
    except ClientError as error:
        raise _answered(error, address, bucket, doing) from error
    except INTERRUPTED as error:
        raise ServiceError(
            f"the object store at {address} does not answer ({type(error).__name__} while {doing}): {_SAFE}; "
            "start it with `hydraopt up`, or check HYDRAOPT_S3_ENDPOINT, and run this again"
        ) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ServiceError(
            f"there is no key for the object store at {address} (found while {doing}): set "
            "HYDRAOPT_S3_ACCESS_KEY and HYDRAOPT_S3_SECRET_KEY, or start the local one with `hydraopt up`"
        ) from error
    except BotoCoreError as error:
        # Its own text may quote what was sent or received; its kind says enough.
        raise ServiceError(
            f"what answers at {address} cannot be understood as an object store ({type(error).__name__} while "
            f"{doing}): {_SAFE}; check HYDRAOPT_S3_ENDPOINT and run this again"
        ) from error


def _answered(error: ClientError, address: str, bucket: str, doing: str) -> ServiceError:
    """One sentence for an answer that is an error: what it means and the way out."""
    code, status = code_of(error), status_of(error)
    if code in _OUT_OF_TIME:
        return ServiceError(
            f"the object store at {address} refused a request while {doing} ({code}): this machine's clock and the "
            f"store's differ. {_SAFE.capitalize()}; set the clock right, then run this again"
        )
    if code in _REFUSED or status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return DeniedError(
            f"the object store at {address} refused our key while {doing} ({code}): check "
            f"HYDRAOPT_S3_ACCESS_KEY and HYDRAOPT_S3_SECRET_KEY, and what the key may do in bucket {bucket!r}"
        )
    if code == "NoSuchBucket":
        return ServiceError(
            f"the object store at {address} has no bucket {bucket!r}: create it, or set HYDRAOPT_S3_BUCKET "
            f"(found while {doing})"
        )
    return ServiceError(
        f"the object store at {address} failed while {doing}: {code} (HTTP {status}). {_SAFE.capitalize()}; see "
        "`hydraopt status`, its log and whether its disk is full, then run this again"
    )
