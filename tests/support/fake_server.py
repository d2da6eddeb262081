"""An in-process server with known faults, to test the clients: answers in SGLang's and OpenAI's form, decodes nothing.

Token i of a prompt is a fixed function of the prompt, so a server without faults is deterministic. With a flip rate, each
step of a request that runs beside others flips with that probability, and every later token differs, as after a real flip.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

VOCABULARY = 50_000


class FakeServer:
    """A server for tests; ``with FakeServer(...) as fake: fake.base_url``.

    Parameters
    ----------
    flip_rate
        Probability of a flip per step of a request that runs beside others.
    gauge
        ``margingate`` (counts in /margingate/status), ``loads`` (/v1/loads), ``metrics`` or none.
    native
        Speak SGLang's API; else OpenAI's only.
    token_ids
        Whether /v1/completions gives them.
    serial
        Run requests one by one, so that no batch ever forms.
    status
        Further fields of /margingate/status.
    dies_after
        Close the connection without an answer after this many requests.
    tokenizer
        False: as SGLang with --skip-tokenizer-init, take token ids only and answer without text.
    takes_ids
        Whether /v1/completions takes token ids.
    model
        Name or folder of the model.
    pool, most_requests
        Tokens and requests that /v1/loads says the server holds; None: it has no such page but for the gauge.

    noise
        What the log-probabilities of a request differ by when it runs beside others.

    As SGLang, it ends with an id beyond its vocabulary: no answer, to this request or later ones.
    """

    def __init__(
        self,
        flip_rate: float = 0.0,
        gauge: str = "margingate",
        native: bool = True,
        token_ids: bool = True,
        serial: bool = False,
        status: dict[str, Any] | None = None,
        dies_after: int | None = None,
        seed: int = 0,
        seconds: float = 0.015,
        tokenizer: bool = True,
        takes_ids: bool = True,
        model: str = "fake-model",
        pool: int | None = None,
        most_requests: int = 64,
        noise: float = 0.0,
    ) -> None:
        self.noise = noise
        self.pool, self.most_requests = pool, most_requests
        self.tokenizer, self.takes_ids, self.model = tokenizer, takes_ids, model
        self.flip_rate, self.gauge, self.native, self.token_ids = flip_rate, gauge, native, token_ids
        self.status, self.dies_after, self.seconds = status or {}, dies_after, seconds
        self.served = self.running = self.flips = 0
        self.by_rows: Counter[int] = Counter()
        self.seen: list[dict[str, Any]] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._turn: Any = threading.Lock() if serial else None
        self._http = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def decode(self, text: str, steps: int) -> list[int]:
        """Return the tokens of a prompt, flips included, and count its steps by batch size."""
        if self._turn is not None:
            with self._turn:
                return self._decode(text, steps)
        return self._decode(text, steps)

    def _decode(self, text: str, steps: int) -> list[int]:
        with self._lock:
            self.running += 1
            rows = self.running
        time.sleep(self.seconds)
        with self._lock:
            rows = max(rows, self.running)
            self.by_rows[rows] += steps
            flip = steps
            if rows > 1 and self.flip_rate:
                flip = int(math.log(1 - self._random.random()) / math.log1p(-self.flip_rate))  # steps until the first
            self.flips += flip < steps
            self.running -= 1
        start = zlib.crc32(text.encode())
        return [(start + 7919 * i + (i >= flip)) % VOCABULARY for i in range(steps)]

    def margingate(self, text: str, params: dict[str, Any], steps: int) -> dict[str, Any]:
        """Return a gate's summary: margins depend on the prompt alone, flips reach further when less is repaired."""
        custom = params.get("custom_params") or {}
        tau = float(custom.get("margingate_threshold", 0.5))
        rng = random.Random(text)
        margins = [round(rng.expovariate(0.5) * 64) / 64 for _ in range(steps)]
        chances = [rng.random() for _ in range(steps)]
        reach = 0.1 if tau >= 0.25 else 0.2
        flipped = [i > 0 and m <= reach and c < 0.3 for i, (m, c) in enumerate(zip(margins, chances))]
        reason = ["none", *("margin" if m <= tau else "audit" for m in margins[1:])]
        detail = {"margin": margins, "verified": [r != "none" for r in reason], "flipped": flipped, "reason": reason}
        counts = {"steps": steps, "triggers": sum(m <= tau for m in margins), "verified": steps, "flips": sum(flipped)}
        return {"guarantee": "gated", "per_token": detail, "max_batch_rows": self.running, **counts}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that broke."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: two would wait for a delayed acknowledgement, 40 ms each
    fake: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        fake = self.fake
        path = self.path.partition("?")[0]
        if path == "/model_info" and fake.native:
            self._answer(200, {"model_path": fake.model})
        elif path == "/server_info" and fake.native:
            self._answer(200, {"skip_tokenizer_init": not fake.tokenizer, "context_length": None})
        elif path == "/v1/models":
            self._answer(200, {"data": [{"id": fake.model}]})
        elif path == "/v1/loads" and (fake.gauge == "loads" or fake.pool is not None):
            with fake._lock:
                rows, steps = sum(k * v for k, v in fake.by_rows.items()), sum(fake.by_rows.values())
            load = {"num_running_reqs": fake.running, "decode_moments": [steps, rows, 2000 * steps, 0, 0, 0]}
            if fake.pool is not None:
                load |= {"max_total_num_tokens": fake.pool, "max_running_requests": fake.most_requests}
            self._answer(200, {"loads": [load]})
        elif path == "/metrics" and fake.gauge == "metrics":
            self._answer(200, f'vllm:num_requests_running{{model="fake"}} {fake.running}.0\n')
        elif path == "/margingate/status" and fake.gauge == "margingate":
            rows = {"steps_by_rows": {str(k): v for k, v in fake.by_rows.items()}}
            status = {"policy": "gate", "threshold": 0.5, "audit_rate": 1.0, "repair": "window", "batch_rows": rows}
            self._answer(200, {**status, **fake.status})
        else:
            self._answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.path == "/flush_cache":
            self._answer(200 if fake.native else 404, {})
            return
        fake.served += 1
        fake.seen.append(body)
        if any(i >= VOCABULARY for i in body.get("input_ids") or ()):
            fake.dies_after = 0
        if fake.dies_after is not None and fake.served > fake.dies_after:
            self.close_connection = True
            return
        if self.path == "/generate" and fake.native:
            if "text" in body and not fake.tokenizer:
                self._answer(400, {"error": {"message": "skip_tokenizer_init=True cannot accept text prompts"}})
                return
            params = body["sampling_params"]
            text = str(body.get("text") or body["input_ids"])
            tokens = fake.decode(text, params["max_new_tokens"])
            meta = {"finish_reason": {"type": "length"}, "cached_tokens": 0, "completion_tokens": len(tokens)}
            if body.get("return_logprob"):
                shift = fake.noise * (fake.running > 0)
                meta["output_token_logprobs"] = [[-0.25 - t / VOCABULARY + shift, t, None] for t in tokens]
            if fake.gauge == "margingate":
                meta["margingate"] = fake.margingate(text, params, len(tokens))
            out = {"output_ids": tokens, "meta_info": meta}
            if fake.tokenizer:
                out["text"] = _text(tokens)
            first = {**out, "output_ids": tokens[:1], "meta_info": {**meta, "completion_tokens": 1}}
            chunks = "".join(f"data: {json.dumps(c)}\n\n" for c in (first, out))
            self._answer(200, f"{chunks}data: [DONE]\n\n" if body.get("stream") else out)
        elif self.path == "/v1/completions":
            if "return_token_ids" in body and not fake.token_ids:
                self._answer(400, {"error": {"message": "unknown field return_token_ids"}})
                return
            if not isinstance(body["prompt"], str) and not fake.takes_ids:
                self._answer(422, {"error": {"message": "prompt: a string is expected"}})
                return
            tokens = fake.decode(str(body["prompt"]), body["max_tokens"])
            choice = {"text": _text(tokens), "finish_reason": "length"}
            self._answer(200, {"choices": [choice | ({"token_ids": tokens} if fake.token_ids else {})]})
        else:
            self._answer(404, {"error": "not found"})

    def _answer(self, code: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))
