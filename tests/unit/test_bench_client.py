"""The one client of ``/generate``: whole answers, streams as they arrive, errors in one line; and the one table writer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from fake_server import FakeServer

from sglang_margingate.bench import tables
from sglang_margingate.bench.servers.client import Client, Prompt, ServerError, brief


class Pieces(httpx.SyncByteStream):
    """An answer in pieces that end where it suits the network."""

    def __init__(self, pieces: list[bytes], fails: bool = False) -> None:
        self.pieces, self.fails, self.closed = pieces, fails, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.fails:
            raise httpx.RemoteProtocolError("peer closed connection")

    def close(self) -> None:
        self.closed = True


def client_of(answer: httpx.Response) -> Client:
    client = Client("http://there")
    client._http = httpx.Client(transport=httpx.MockTransport(lambda request: answer))
    return client


def test_chunks_are_whole_however_the_network_cuts_them() -> None:
    body = b'data: {"a": 1}\n\ndata: {"a": 2}\n\n: a comment\n\ndata: [DONE]\n\n'
    for size in (1, 7, 16, len(body)):
        pieces = Pieces([body[i : i + size] for i in range(0, len(body), size)])
        found = list(client_of(httpx.Response(200, stream=pieces)).stream({}))
        assert found == [b' {"a": 1}', b' {"a": 2}']


def test_closing_a_stream_hangs_up() -> None:
    pieces = Pieces([b"data: 1\n\n", b"data: 2\n\n"])
    chunks = client_of(httpx.Response(200, stream=pieces)).stream({})
    assert next(chunks) == b" 1"
    chunks.close()
    assert pieces.closed


def test_a_stream_that_breaks_or_is_refused_is_one_line() -> None:
    broken = client_of(httpx.Response(200, stream=Pieces([b"data: 1\n\n"], fails=True)))
    broken.post_mortem = lambda: "; the server died"
    with pytest.raises(
        ServerError, match=r"^POST http://there/generate: remote end closed connection; the server died$"
    ):
        list(broken.stream({}))
    with FakeServer(tokenizer=False) as fake:
        refused = Client(fake.base_url)
        with pytest.raises(ServerError, match="prompt p: HTTP 400: skip_tokenizer_init=True cannot accept text"):
            list(refused.stream(refused.payload(Prompt("p", "x", "d"), 4), "prompt p"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), "connection refused"),
        (httpx.ReadError("[Errno 104] Connection reset by peer"), "connection reset"),
        (httpx.ReadTimeout("timed out"), "no answer in time"),
        (httpx.InvalidURL("no such\nport"), "no such port"),
    ],
)
def test_errors_are_few_words(error: Exception, words: str) -> None:
    assert brief(error) == words


def test_tables_are_never_cut_and_take_text_as_it_is() -> None:
    rows = [["a" * 200, "1"], ["[red]b", "20,000"]]
    lines = tables.text(["name", "n"], rows).splitlines()
    assert lines[1] == "a" * 200 + "       1"
    assert lines[2].startswith("[red]b ")
    marked = tables.markdown(["name", "n"], [["x|y", 7]]).splitlines()
    assert marked == ["| name | n |", "| ---- | -: |", "| x\\|y | 7 |"]


def test_no_connection_is_used_again_that_a_server_may_be_closing() -> None:
    """SGLang's closes after 5 idle seconds; a request that is sent at that moment gets no answer."""
    ports: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open

        def do_GET(self) -> None:
            ports.append(self.client_address[1])
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{server.server_address[1]}")
        assert client.status() == {}
        time.sleep(1.1)
        assert client.status() == {}
        server.shutdown()
    assert len(set(ports)) == 2
