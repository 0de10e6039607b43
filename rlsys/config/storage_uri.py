"""Rules about the URI of `run.storage`: it is written to files, so it holds no secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, urlsplit

# Parts of the names of query parameters whose values are secrets.
SECRET_WORDS = ("secret", "password", "token", "access_key", "account_key", "sas", "signature")


def storage_mistake(uri: str) -> str | None:
    """Return why a URI is refused, with the remedy and without the URI; None where it is not."""
    scheme, _, rest = uri.partition("://")
    # Not by `urlsplit`: a secret key may hold a slash.
    if ":" in rest.partition("@")[0] and "@" in rest:
        return (
            f"run.storage: the {scheme}:// URI holds a password or secret key, which would be "
            "written to config.yaml and the logs. Leave out everything before the @, and set the "
            "credentials in the environment (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "run.storage: it is no valid URI. Write a directory, or s3://bucket/runs/name."
    for name, _ in parse_qsl(parts.query):
        if any(word in name.lower() for word in SECRET_WORDS):
            return (
                f"run.storage: the query parameter {name!r} is a secret, which would be written to "
                "config.yaml and the logs. Leave it out, and set the credentials in the "
                "environment."
            )
    if parts.scheme and not stored_name(uri):
        return (
            f"run.storage: {uri!r} is not the place of one run. Name a folder in it, such as "
            f"{parts.scheme}://{parts.netloc or 'bucket'}/runs/name."
        )
    return None


def stored_name(uri: str) -> str:
    """Return the last part of the path of a URI or directory; empty where it has none."""
    return PurePosixPath(urlsplit(uri).path).name


def unsupported_storage(uri: str | None, kind: str) -> Iterator[str]:
    """Yield a line where `run.storage` is set in a kind of run that does not store its files."""
    if uri is not None:
        yield (
            f"run.storage: {uri!r}: {kind} stores nothing in a second place. Leave it null, and "
            "name a directory that outlives the machine, such as a mounted network disk, in "
            "run.directory."
        )
