"""A real S3 server on this machine: moto's, in threads of this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "rlsys-tests"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class S3Server:
    """A running server with one empty bucket."""

    address: str

    def uri(self, path: str) -> str:
        """Return the URI of a folder in the bucket."""
        return f"s3://{BUCKET}/{path}?endpoint_override=http://{self.address}&scheme=http"

    @property
    def client(self):
        """A client of another implementation than the one under test."""
        return boto3.client("s3", endpoint_url=f"http://{self.address}", region_name="us-east-1")

    def keys(self, path: str) -> list[str]:
        """Return the names of all objects in a folder that are not markers of folders."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{path}/").get("Contents", [])
        names = [item["Key"].removeprefix(f"{path}/") for item in found]
        return sorted(name for name in names if name and not name.endswith("/"))


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server on a free port, with credentials for it in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with mock.patch.dict(os.environ, CREDENTIALS):
            host, port = server.get_host_and_port()
            started = S3Server(f"{host}:{port}")
            started.client.create_bucket(Bucket=BUCKET)
            yield started
    finally:
        server.stop()
