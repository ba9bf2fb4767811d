"""A corpus and a cache in a bucket of a local S3 server (moto): read, published, fetched, trained from."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_cache
from small_cache import IN_PROCESS, files_of, made, run_file
from xkd_pipeline.fetch import fetch
from xkd_pipeline.remote import publish
from xkd_pipeline.stages import documents_stage
from xkd_pipeline.verify import verify
from xkd_schemas.errors import BadData, InputMissing
from xkd_schemas.table import Table
from xkd_trainer.loop import train

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


def test_a_student_trains_from_a_cache_that_came_from_a_bucket(tmp_path: Path, bucket: str) -> None:
    publish(made() / "cache", f"{bucket}/caches/one")
    fetch(f"{bucket}/caches/one", tmp_path / "back")
    run = run_file(
        tmp_path / "back",
        student={"model": "new:llama,layers=4,width=32", "tokenizer": str(made() / "student")},
        train={"loss": "mta+sra+dwa", "steps": 2, "batch_size": 4, "out": str(tmp_path / "out"), "log_every": 1},
    )

    assert files_of(tmp_path / "back") == files_of(made() / "cache")
    assert verify(tmp_path / "back") == []
    train(run, student_table="S", quiet=True)
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2


def test_what_is_wrong_in_a_bucket_is_told(tmp_path: Path, bucket: str) -> None:
    publish(made() / "cache", f"{bucket}/one")
    store().pipe_file(f"{bucket}/one/documents/plan.json", json.dumps({"other": 1}).encode())

    with pytest.raises(BadData, match=r"documents/plan\.json is not what SHA256SUMS says"):
        fetch(f"{bucket}/one", tmp_path / "again")
    with pytest.raises(InputMissing, match="holds no SHA256SUMS"):
        fetch(f"{bucket}/none", tmp_path / "none")
    with pytest.raises(InputMissing, match=r"s3://no-such-bucket-here"):
        publish(small_cache.copied(tmp_path), "s3://no-such-bucket-here/cache")
    assert not store().exists("no-such-bucket-here")
