"""A corpus in a bucket of a local S3 server (moto)."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from small_cache import IN_PROCESS, made, run_file
from xkd_pipeline.stages import documents_stage
from xkd_schemas.cache.table import Table
from xkd_schemas.errors import InputMissing

for name in ("s3fs", "moto", "flask"):
    pytest.importorskip(name, reason="pip install s3fs 'moto[s3]' flask flask-cors to test with an S3 server")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    gc.collect()  # its sockets, before a test of another module is blamed for them


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    import s3fs

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


def store() -> Any:
    import s3fs

    return s3fs.S3FileSystem()


def test_documents_of_a_corpus_in_a_bucket_have_the_same_bytes(tmp_path: Path, bucket: str) -> None:
    store().pipe_file(f"{bucket}/corpus.jsonl", (made() / "corpus.jsonl").read_bytes())
    run = run_file(tmp_path / "cache", documents={"corpus": [f"{bucket}/corpus.jsonl"]})

    documents_stage(run, IN_PROCESS)

    assert Table(tmp_path / "cache", "documents").manifest.root == Table(made() / "cache", "documents").manifest.root


def test_a_file_that_is_not_in_a_bucket_is_told(tmp_path: Path, bucket: str) -> None:
    run = run_file(tmp_path / "cache", documents={"corpus": [f"{bucket}/none.jsonl"]})

    with pytest.raises(InputMissing, match=r"none\.jsonl is not a file there"):
        documents_stage(run, IN_PROCESS)
