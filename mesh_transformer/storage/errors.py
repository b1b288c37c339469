# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint and storage exceptions, and explanations of object-store errors."""

import re

URL = re.compile(r"([a-z0-9]+)://([^/]+)")
CREDENTIAL_HINTS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
# (pattern in the library's error, explanation); the first match wins.
ERROR_HINTS = (
    (r"NoCredentials|PartialCredentials|Unable to locate credentials|CredentialRetrieval|DefaultCredentialsError"
     r"|ProfileNotFound|No valid credentials|Anonymous caller", "no credentials; {credentials}"),
    (r"NoSuchBucket|specified bucket does not exist|no such bucket|bucket does not exist",
     "no such bucket: {bucket}; create it, or correct its name in the URL or {endpoint}"),
    (r"PermissionError|AccessDenied|PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch"
     r"|ExpiredToken|(code: |\(|, )40[13]\b",
     "permission denied; the credentials need list, read, write and delete access to {bucket}"),
    (r"SlowDown|ServiceUnavailable|InternalError|Service Unavailable|(code: |\(|, )50\d\b",
     "the object store returned an error after several retries; run the command again later"),
    (r"Connect|Timeout|timed out|HTTPClientError|ClientOSError|ResponseStreaming|ServerDisconnected|IncompleteRead"
     r"|PayloadError|UNAVAILABLE|resolve host|CURL|Broken pipe|reset by peer|DEADLINE",
     "cannot connect to the object store; check the network and {endpoint}, then run the command again"),
    (r"InvalidBucketName|Invalid bucket name|Not a valid bucket", "{bucket} is not a valid bucket name; correct the URL"),
    (r"PermanentRedirect|AuthorizationHeaderMalformed|response code: 301",
     "the bucket {bucket} is in another region; set AWS_REGION to that region"),
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged or does not match the request; the message names the array and the file."""


class StorageError(CheckpointError):
    """A path cannot be accessed; unlike other CheckpointErrors, this does not mean that its content is damaged."""


def explain_error(path: object, error: BaseException) -> str | None:
    """Return the cause and fix of an object-store error, with its original text; None for an unknown error.

    `path` is the URL that was accessed; for a local path the result is None.
    """
    match = URL.match(str(path))
    if not match:
        return None
    scheme, bucket = match.groups()
    chain, cause = "", error
    while cause is not None:
        # Names of objects may contain words such as "Timeout": remove them before matching.
        text = re.sub(rf'\w+://\S+|"[^"]*"|\b{re.escape(bucket)}/\S*', "", str(cause))
        chain += f"{type(cause).__name__}: {text}\n"
        cause = cause.__cause__
    for pattern, hint in ERROR_HINTS:
        if re.search(pattern, chain):
            endpoint = "AWS_ENDPOINT_URL" if scheme == "s3" else "the project"
            explanation = hint.format(bucket=bucket, endpoint=endpoint, credentials=CREDENTIAL_HINTS[scheme])
            return f"{explanation} ({one_line(error)})"
    return None


def one_line(error: BaseException) -> str:
    """Return the type and text of an error on one line of at most 300 characters."""
    text = re.sub(r"\s*\[(source locations|tensorstore_spec|http_response_body).*", "", str(error), flags=re.DOTALL)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"
