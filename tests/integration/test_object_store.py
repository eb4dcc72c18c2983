"""The object store's promises, on a real server."""

from __future__ import annotations

import hashlib
import http.server
import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hydraopt.errors import RecordError, ServiceError
from infra import blobs
from infra.blobs import BlobRef
from infra.object_store import ObjectStore

pytestmark = pytest.mark.integration


def stored_under(store: ObjectStore, key: str, data: bytes) -> None:
    """What an attacker or a broken disk does: other bytes under an existing name."""
    store._client.put_object(Bucket=store.bucket, Key=key, Body=data)


def test_server_keeps_its_promises(object_store):
    object_store.self_test()
    assert list(object_store.keys("self-test/")) == []


def test_exactly_one_of_sixteen_racing_creators_wins(object_store):
    for _ in range(5):
        key = f"race/{secrets.token_hex(8)}"
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda i, key=key: object_store.create(key, str(i).encode()), range(16)))
        assert won.count(True) == 1
        assert object_store.read(key)[0] == str(won.index(True)).encode()


def test_exactly_one_of_sixteen_racing_replacers_wins(object_store):
    key = f"race/{secrets.token_hex(8)}"
    object_store.create(key, b"start")
    etag = object_store.read(key)[1]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: object_store.replace(key, str(i).encode(), etag), range(16)))
    assert won.count(True) == 1
    assert object_store.read(key)[0] == str(won.index(True)).encode()


def test_replacing_what_is_not_there_does_nothing(object_store):
    key = f"absent/{secrets.token_hex(8)}"
    assert not object_store.replace(key, b"new", '"00000000000000000000000000000000"')
    assert object_store.read(key) is None


def test_blob_comes_back_as_it_was(object_store, tmp_path):
    content = os.urandom(100_000)
    ref = object_store.put_blob(content)
    assert ref == BlobRef(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    object_store.fetch_blob(ref, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    assert object_store.read_blob(ref) == content
    assert object_store.exists_blob(ref)


def test_empty_blob_is_a_blob(object_store, tmp_path):
    ref = object_store.put_blob(b"")
    object_store.fetch_blob(ref, tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_racing_uploads_of_one_blob_all_succeed(object_store, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(50_000))
    with ThreadPoolExecutor(16) as pool:
        refs = set(pool.map(lambda _: object_store.put_blob(path).sha256, range(16)))
    assert len(refs) == 1


@pytest.mark.parametrize("damaged", [b"other", b"longer than it was"])
def test_damaged_blob_is_refused_everywhere(object_store, tmp_path, damaged):
    content = b"right" + os.urandom(8)
    ref = object_store.put_blob(content)
    same_size = damaged.ljust(len(content), b".") if len(damaged) < len(content) else damaged
    stored_under(object_store, ref.key, same_size)
    target = tmp_path / "copy"
    target.write_bytes(b"before")
    with pytest.raises(RecordError, match="not what its name promises"):
        object_store.fetch_blob(ref, target)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(RecordError, match="does not hold the bytes"):
        object_store.put_blob(content)
    assert not object_store.exists_blob(ref)


def test_file_that_changes_during_the_upload_is_refused_by_the_server(object_store, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before" + os.urandom(8))
    measured = blobs.measure(path)
    path.write_bytes(b"after!" + os.urandom(8))
    monkeypatch.setattr("infra.object_store.measure", lambda _: measured)
    with pytest.raises(ServiceError, match="BadDigest"):
        object_store.put_blob(path)
    assert not object_store.exists_blob(measured.ref)


def test_missing_blob_is_named(object_store, tmp_path):
    ref = BlobRef(sha256="0" * 64, bytes=3)
    assert not object_store.exists_blob(ref)
    with pytest.raises(RecordError, match="0000 is missing"):
        object_store.fetch_blob(ref, tmp_path / "copy")


def test_big_file_goes_up_in_parts_and_comes_back(object_store, tmp_path):
    path = tmp_path / "big"
    with path.open("wb") as handle:
        for _ in range(68):
            handle.write(os.urandom(2**20))
        handle.write(b"tail")
    ref = object_store.put_blob(path)
    head = object_store._client.head_object(Bucket=object_store.bucket, Key=ref.key, ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"].endswith("-3")
    assert object_store.put_blob(path) == ref
    object_store.fetch_blob(ref, tmp_path / "copy")
    assert blobs.measure(tmp_path / "copy").ref == ref
    uploads = object_store._client.list_multipart_uploads(Bucket=object_store.bucket)
    assert not uploads.get("Uploads")


def test_keys_are_listed_over_many_pages(object_store, unique_name):
    wanted = [f"pages/{unique_name}/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: object_store.create(key, b""), wanted))
    assert list(object_store.keys(f"pages/{unique_name}/")) == wanted


def test_dead_address_fails_soon_and_is_named(running_store, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        store = ObjectStore(running_store.settings(tmp_path, s3_endpoint=address))
        started = time.monotonic()
        with pytest.raises(ServiceError, match=f"{address} does not answer"):
            store.read("anything")
    assert time.monotonic() - started < 30


def test_server_that_never_answers_fails_within_the_configured_time(running_store, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = ObjectStore(running_store.settings(tmp_path, s3_endpoint=address, service_timeout_s=3))
        started = time.monotonic()
        with pytest.raises(ServiceError, match="does not answer"):
            store.put_blob(b"anything")
    assert time.monotonic() - started < 3 + 10


def test_wrong_key_is_told_without_the_secret(running_store, tmp_path):
    secret = "not-the-secret-" + secrets.token_hex(4)
    for changes in ({"s3_secret_key": secret}, {"s3_access_key": "nobody", "s3_secret_key": secret}):
        store = ObjectStore(running_store.settings(tmp_path, **changes))
        for verb in (lambda store=store: store.put_blob(b"x"), lambda store=store: store.read("x")):
            with pytest.raises(ServiceError, match="refused our key") as caught:
                verb()
            assert secret not in str(caught.value)


def test_reading_key_reads_and_is_refused_writing(running_store, object_store, tmp_path):
    ref = object_store.put_blob(b"for readers")
    reader = ObjectStore(running_store.reader_settings(tmp_path))
    assert reader.read_blob(ref) == b"for readers"
    with pytest.raises(ServiceError, match="refused our key while storing"):
        reader.put_blob(b"from a reader")
    with pytest.raises(ServiceError, match="refused our key"):
        reader.self_test()


def test_missing_bucket_is_named(running_store, tmp_path):
    store = ObjectStore(running_store.settings(tmp_path, s3_bucket="no-such-bucket"))
    with pytest.raises(ServiceError, match="no bucket 'no-such-bucket'"):
        store.read("anything")


def test_another_kind_of_server_is_told_apart(running_store, tmp_path):
    class Page(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        do_GET = do_PUT = do_HEAD = answer  # noqa: N815 - names the base class looks for

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        store = ObjectStore(running_store.settings(tmp_path, s3_endpoint=address))
        with pytest.raises(ServiceError, match=address):
            store.self_test()
        server.shutdown()


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match", "x-amz-checksum-sha256"])
def test_store_that_breaks_a_promise_is_refused(running_store, tmp_path, header):
    """A real server behind something that loses one header, as simple S3 servers ignore it."""
    store = ObjectStore(running_store.settings(tmp_path, s3_checksums="when_required"))

    def lose(request, **_):
        del request.headers[header]

    store._client.meta.events.register("before-sign.s3.PutObject", lose)
    with pytest.raises(ServiceError, match=r"ignores If-|do not match their SHA-256"):
        store.self_test()
