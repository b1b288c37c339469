# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a checkpoint, and what an error of an object store means to the person who sees it."""

import re

URL = re.compile(r"([a-z0-9]+)://([^/]+)")
CREDENTIAL_HINTS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
# What the libraries say, in the order in which it is looked for, and what it means.
ERROR_HINTS = (
    (r"NoCredentials|PartialCredentials|Unable to locate credentials|CredentialRetrieval|DefaultCredentialsError"
     r"|ProfileNotFound|No valid credentials|Anonymous caller", "no credentials; {credentials}"),
    (r"NoSuchBucket|specified bucket does not exist|no such bucket|bucket does not exist",
     "no such bucket: {bucket}; make it first, or mind its spelling and {endpoint}"),
    (r"PermissionError|AccessDenied|PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch"
     r"|ExpiredToken|(code: |\(|, )40[13]\b",
     "permission denied; these credentials need to list, read, write and delete in {bucket}"),
    (r"SlowDown|ServiceUnavailable|InternalError|Service Unavailable|(code: |\(|, )50\d\b",
     "the store itself fails, also when asked again; call this again later"),
    (r"Connect|Timeout|timed out|HTTPClientError|ClientOSError|ResponseStreaming|ServerDisconnected|IncompleteRead"
     r"|PayloadError|UNAVAILABLE|resolve host|CURL|Broken pipe|reset by peer|DEADLINE",
     "cannot be reached; check the network and {endpoint}, then call this again"),
    (r"InvalidBucketName|Invalid bucket name|Not a valid bucket", "{bucket} is not the name of a bucket"),
    (r"PermanentRedirect|AuthorizationHeaderMalformed|response code: 301", "the bucket is in another region; set AWS_REGION"),
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is not there, not complete, damaged, or not what was asked for; names the array and the file."""


class StorageError(CheckpointError):
    """A place that cannot be reached or used, which says nothing of what lies there."""


def explain_error(path: object, error: BaseException) -> str | None:
    """What an error at a URL means, with the remedy and its own words; None if it is none of a store, or `place` no URL."""
    match = URL.match(str(path))
    if not match:
        return None
    scheme, bucket = match.groups()
    chain, seen = "", error
    while seen is not None:
        words = re.sub(rf'\w+://\S+|"[^"]*"|\b{re.escape(bucket)}/\S*', "", str(seen))  # names say nothing
        chain += f"{type(seen).__name__}: {words}\n"
        seen = seen.__cause__
    for pattern, words in ERROR_HINTS:
        if re.search(pattern, chain):
            endpoint = "AWS_ENDPOINT_URL" if scheme == "s3" else "the project"
            meaning = words.format(bucket=bucket, endpoint=endpoint, credentials=CREDENTIAL_HINTS[scheme])
            return f"{meaning} ({one_line(error)})"
    return None


def one_line(error: BaseException) -> str:
    """Kind and words of an error, not more than a line of them."""
    text = re.sub(r"\s*\[(source locations|tensorstore_spec|http_response_body).*", "", str(error), flags=re.DOTALL)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"
