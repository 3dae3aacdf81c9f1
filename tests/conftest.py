"""What every test shares: shapes checked at run time, one thread, and real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

from tests import shape_checks
from tests.servers import S3Server, s3_server

# Hooked before any of them is imported; only where tensors are, since beartype can't read Self or plain Protocols.
TENSOR_PACKAGES = (
    "ldm.autoencoder",
    "ldm.unet",
    "ldm.diffusion",
    "ldm.losses",
    "ldm.samplers",
    "ldm.latents",
    "ldm.evaluation",
)
install_import_hook(TENSOR_PACKAGES, f"{shape_checks.__name__}.{shape_checks.checked.__name__}")

# Sums depend on how many threads share them: one thread makes equal runs equal on every machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session; every AWS client of this process and its children talks to it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def s3_root(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """An `s3://` folder of the test's own."""
    return f"s3://{s3.bucket}/{request.node.name.replace('[', '-').rstrip(']')}"
