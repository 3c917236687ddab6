"""Object stores: which there are, how they are asked, and what their errors mean to people.

fsspec does the talking. Asked again are questions that a network at fault has left without an answer; a store that
has never answered this process is given up within 10 seconds, for then it may be the address that is at fault.
"""

import contextlib
import errno
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lipprep.stages.untrusted import printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CONNECT = 4.0  # seconds
_SILENCE = 20.0  # seconds
_FIRST = 7.0  # seconds for the first answer, with all tries: to start the program takes its time, too
_LATER = 60.0  # seconds that an answer may take, beside the time of a transfer
_SLOWEST = 100_000  # bytes a second
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
_PART, _PARTS = 8 << 20, 4  # bytes of a part of an upload, and how many are in memory and on their way at once


AGAIN = ", then run the same command again to go on"


class RemoteError(Exception):
    """A store cannot be reached, or refuses. The message says why and what to do.

    Neither ValueError nor OSError, so that nobody who catches those of a missing or damaged file takes a network that
    is away for one, and makes again, or records as failed, what is there.
    """


class BehindEnd(RemoteError):
    """The range that was asked for begins where the file has ended."""


@dataclass(frozen=True)
class Store:
    """A kind of store: how its package is installed, where its credentials come from, and what fsspec is to be told.

    `lists` says whether a listing tells the sizes and tags of files.
    """

    install: str
    credentials: str
    options: Mapping[str, Any] = field(default_factory=dict)
    upload: Mapping[str, Any] = field(default_factory=dict)
    read_only: bool = False
    lists: bool = True


_S3 = Store(
    'pip install "lipprep[s3]"',
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket",
    options={
        "config_kwargs": {
            "connect_timeout": _CONNECT,
            "read_timeout": _SILENCE,
            "retries": {"mode": "standard", "total_max_attempts": 2},
        }
    },
    upload={"chunksize": _PART, "max_concurrency": _PARTS},
)
_GS = Store(
    "pip install gcsfs",
    "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
)
_AZURE = Store(
    "pip install adlfs",
    "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    upload={"overwrite": True},
)
_HTTP = Store("pip install aiohttp", "write https://USER:PASSWORD@HOST/FOLDER", read_only=True, lists=False)
_HF = Store("pip install huggingface_hub", "run `hf auth login`, or set HF_TOKEN", read_only=True)
# Those that show an object whole or not at all. Protocols that run something (ssh, pipe), that read what a file says
# they shall (reference, generic), or that show a file while it grows (ftp, smb, webdav) have no place here.
STORES = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GS),
    **dict.fromkeys(("az", "abfs", "abfss"), _AZURE),
    **dict.fromkeys(("http", "https"), _HTTP),
    "hf": _HF,
}
# Errors that pass, of libraries that need not be installed: by the names of their classes.
_PASSING = {
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "ConnectionError",  # botocore, requests
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "ServiceRequestError",  # azure
    "ServiceResponseError",
    "TransportError",  # google.auth
}
# What is at fault where a client cannot even be made, by the error's class or what it says.
_SETTINGS = {
    "ProfileNotFound": "AWS_PROFILE",
    "ConfigParseError": "AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE",
    "InvalidRegionError": "AWS_DEFAULT_REGION (as in us-east-1)",
    "Invalid endpoint": "AWS_ENDPOINT_URL (as in http://localhost:9000)",
}
_LOGIN = ("SSO", "TokenRetrieval")  # in the names of botocore's errors
_INSECURE = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")  # never get better, though their classes pass
_PASSWORD = re.compile(r"(://[^/@:\s]*):[^/\s]*@")
_BUSY = {errno.EBUSY, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EBUSY)}  # what s3fs makes of 500 and 503

_filesystems: dict[tuple[int, str], "AbstractFileSystem"] = {}
_answered: set[str] = set()  # roots
# It logs, with a traceback, errors that are told in a line here.
logging.getLogger("aiobotocore").addHandler(logging.NullHandler())


def masked(text: str) -> str:
    """`text` without the passwords of URLs in it.

    >>> masked("https://user:secret@host/x: no answer")
    'https://user:***@host/x: no answer'
    """
    return _PASSWORD.sub(r"\1:***@", text)


def store_of(root: str) -> Store:
    """The kind of store of a `root`, a protocol and a bucket or host: `s3://bucket`."""
    return STORES[root.partition("://")[0]]


def check_installed(protocol: str) -> None:
    """Raise RemoteError, with the remedy, where the package that speaks `protocol` is not installed."""
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        raise RemoteError(
            f"reading {protocol}:// needs a package that is not installed: {STORES[protocol].install}"
        ) from error


def filesystem(root: str) -> "AbstractFileSystem":
    """The fsspec file system of a root, one for each process: its threads and sockets do not live through a fork."""
    key = os.getpid(), root
    if key not in _filesystems:
        from fsspec import get_filesystem_class

        protocol = root.partition("://")[0]
        check_installed(protocol)
        kind = get_filesystem_class(protocol)
        made = kind(
            **kind._get_kwargs_from_urls(root),
            **store_of(root).options,
            use_listings_cache=False,  # others write there, too
            skip_instance_cache=True,
        )
        if hasattr(made, "retries"):
            made.retries = 1  # what is tried again, and how often, is said here
        _filesystems[key] = made
    return _filesystems[key]


def ask(root: str, path: str, call: str, *args: object, seconds: float = 0, transfer: int = 0, **options: Any) -> Any:
    """Call the file system's method `call` for `root` + `path`; again where the network was at fault.

    It may take `seconds` longer than other questions, and what a slow line takes for `transfer` bytes. Raises
    FileNotFoundError where there is nothing, RemoteError where the store cannot be reached or refuses.
    """
    url = root + path
    if seconds and root not in _answered:  # a store that is silent is found out sooner by a short question
        with contextlib.suppress(FileNotFoundError):
            ask(root, path, "info")
    pauses, until, told = iter(_PAUSES), math.inf, None
    while True:
        try:
            files = filesystem(root)
            until = min(until, time.monotonic() + _FIRST)  # what it takes to import is not the store's
            if files.async_impl:
                limit = _LATER if root in _answered else max(0.1, until - time.monotonic())
                options["timeout"] = limit + seconds + transfer / _SLOWEST
            answer = getattr(files, call)(*args, files._strip_protocol(url), **options)
        except RemoteError:
            raise
        except Exception as error:  # libraries of stores raise errors of many kinds
            cause = _root_cause(error)
            if isinstance(cause, FileNotFoundError):
                _answered.add(root)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), masked(url)) from error
            if (code := _code(cause)) in ("InvalidRange", "416"):
                raise BehindEnd(f"{masked(url)} ends before") from error
            if code:
                _answered.add(root)
            if told is None or str(cause):  # a try that was given up for want of time has nothing to say
                told = cause
            pause = next(pauses, None)
            late = root not in _answered and time.monotonic() + (pause or 0) > until
            if pause is None or late or not _passes(cause):
                raise RemoteError(_explain(told, root, masked(url))) from error
            time.sleep(pause)
        else:
            _answered.add(root)
            return answer


def _code(error: BaseException) -> str:
    """The store's own code of an error: NoSuchBucket, 403; empty where it has none."""
    response = getattr(error, "response", None)  # botocore
    if isinstance(response, Mapping):
        return str(response.get("Error", {}).get("Code", ""))
    for name in ("status", "code", "status_code"):  # aiohttp, gcsfs, azure
        if isinstance(value := getattr(error, name, None), int | str):
            return str(value)
    return ""


def _root_cause(error: BaseException) -> BaseException:
    """The error behind one: fsspec says of some failures that there is no such file."""
    while isinstance(cause := error.__cause__, Exception) and not _code(error):
        if isinstance(error, FileNotFoundError) and _code(cause) in ("404", "NoSuchKey"):
            return error
        error = cause
    return error


def _passes(error: BaseException) -> bool:
    if any(sign in str(error) for sign in _INSECURE):
        return False
    code = _code(error)
    if code.isdigit():
        return code[0] == "5" or code in ("408", "429")
    if code in ("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"):
        return True
    if isinstance(error, OSError) and error.errno in _BUSY:
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & _PASSING)


def _explain(error: BaseException, root: str, url: str) -> str:
    """What to tell people of an error: where, why, and what to do."""
    store, code, kind = store_of(root), _code(error), type(error).__name__
    said = printable(masked(str(error)) or kind)[:300]
    for sign, setting in _SETTINGS.items():
        if sign == kind or sign in said:
            return f"{url}: {said.rstrip('.')}: see to {setting}"
    if any(sign in said for sign in _INSECURE):
        return (
            f"{url}: there is no secure way to the store ({said}): see to the address; a certificate that only you "
            "know is trusted where AWS_CA_BUNDLE, or SSL_CERT_FILE, names its file"
        )
    if any(sign in kind for sign in _LOGIN):
        return f"{url}: your login has ended ({said.rstrip('.')}): run `aws sso login`{AGAIN}"
    if "redential" in kind:
        return f"{url}: the store wants credentials, and none were found: {store.credentials}"
    if code == "401":
        return f"{url}: the store wants credentials, or others than these: {store.credentials}"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return f"{url}: the store does not take these credentials ({said}): {store.credentials}"
    if code in ("AccessDenied", "403") or isinstance(error, PermissionError):
        rights = "read" if store.read_only else "list, read and write"
        return (
            f"{url}: access denied: ask for the right to {rights} there, or use other credentials "
            f"({store.credentials}). A store may say so of what is not there, too: see to the URL"
        )
    if code in ("NoSuchBucket", "InvalidBucketName"):
        where = masked(root)
        return f"there is no bucket {where}: create it, or see to the URL (and to AWS_ENDPOINT_URL, if that is set)"
    if _passes(error):
        return f"{url}: no answer from the store ({said}): see to the address and the network{AGAIN}"
    return f"{url}: the store refuses ({kind}: {said})"
