import os
from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """A server on loopback that speaks S3, conditional writes included."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    names |= {"ACCESS_KEY_ID": "tests", "SECRET_ACCESS_KEY": "tests"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(f"AWS_{name}", value)
        yield
    server.stop()


@pytest.fixture
def bucket(s3: None) -> str:
    """URL of an empty bucket."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"models-{os.urandom(4).hex()}"
    fs.mkdir(name)
    return f"s3://{name}"
