"""A server of completions on this machine that gives log-probabilities of prompts, and misbehaves as it is told to."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Prompts:
    """What the server knows: log-probabilities by token ids; and what it does to the requests of a prompt.

    `faults` are names by the number of the prompt, in the order of `answers`; those that can pass happen once.
    """

    def __init__(self, answers: Sequence[dict[str, Any]], faults: dict[int, str]) -> None:
        self.known = {tuple(row["token_ids"]): (at, row["logprobs"]) for at, row in enumerate(answers)}
        self.faults = faults
        self.asked = Counter[int]()
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        self.closed = threading.Event()

    def complete(self, handler: "Handler", body: dict[str, Any]) -> None:
        ids = body["prompt"]
        at, values = self.known[tuple(ids)]
        with self.lock:
            self.asked[at] += 1
            first = self.asked[at] == 1
            self.times.append(time.monotonic())
        fault = self.faults.get(at, "")
        if fault in ("stall", "drop", "busy", "half") and first:
            return self._fail_once(handler, fault)
        if fault == "too long":
            return handler.reply(400, {"error": f"maximum length; {handler.headers['authorization']}"})
        if fault == "moved":
            return handler.reply(307, {}, {"Location": "http://127.0.0.1:1/v1/completions"})
        if fault == "no value":
            values = [*values[:-1], None]
        if fault == "lie":
            ids = [*ids[:-1], ids[-1] + 1]
        handler.reply(200, {"choices": [choice_of(ids, values, body)]})

    def _fail_once(self, handler: "Handler", fault: str) -> None:
        if fault == "stall":
            with self.lock:
                self.busy -= 1  # whoever asked goes away meanwhile
            self.closed.wait(5.0)
            with self.lock:
                self.busy += 1
        elif fault == "busy":
            handler.reply(429, {"error": "slow down"}, {"Retry-After": "1"})
        elif fault == "half":
            handler.reply(200, {"choices": []}, {"Content-Length": "9999"})
        handler.close_connection = True


def choice_of(ids: list[int], values: list[float | None], body: dict[str, Any]) -> dict[str, Any]:
    if body.get("echo"):
        tokens = [f"token_id:{token}" for token in [*ids, 5]]
        return {"logprobs": {"tokens": tokens, "token_logprobs": [*values, -1.0]}}
    entries = [{str(t): {"logprob": v}, str(t + 9): {"logprob": -0.5}} for t, v in zip(ids, values, strict=True)]
    return {"prompt_logprobs": [None, *entries[1:]], "text": "!"}


class Handler(BaseHTTPRequestHandler):
    prompts: Prompts

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "big"}]})

    def do_POST(self) -> None:
        self.prompts.headers.append(dict(self.headers))
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.prompts.lock:
            self.prompts.busy += 1
            self.prompts.most = max(self.prompts.most, self.prompts.busy)
        try:
            self.prompts.complete(self, body)
        finally:
            with self.prompts.lock:
                self.prompts.busy -= 1

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(answers: Sequence[dict[str, Any]], faults: dict[int, str] | None = None) -> Iterator[tuple[str, Prompts]]:
    """The address of a server, and what it was asked."""
    prompts = Prompts(answers, faults or {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"prompts": prompts}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", prompts
    finally:
        prompts.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()
