"""A server of completions inside this process that gives log-probabilities of prompts, and misbehaves as told."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import httpx

URL = "http://127.0.0.1:1/v1"
"""Where nobody listens once the server is gone."""
ONCE = {
    "stall": httpx.ReadTimeout("timed out"), "drop": httpx.RemoteProtocolError("server disconnected"),
    "half": httpx.Response(200, text='{"choices": ['),
    "busy": httpx.Response(429, json={"error": "slow down"}, headers={"Retry-After": "1"}),
}  # fmt: skip
"""Faults that pass, and what is answered to the first request."""


class Prompts:
    """What the server knows: log-probabilities by token ids; and what it does to the requests of a prompt.

    `faults` are names by the number of the prompt, in the order of `answers`.
    """

    def __init__(self, answers: Sequence[dict[str, Any]], faults: dict[int, str]) -> None:
        self.known = {tuple(row["token_ids"]): (at, row["logprobs"]) for at, row in enumerate(answers)}
        self.faults = faults
        self.asked = Counter[int]()
        self.headers: list[httpx.Headers] = []
        self.times: list[float] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "big"}]})
        with self.lock:
            self.headers.append(request.headers)
            self.times.append(time.monotonic())
            self.busy += 1
            self.most = max(self.most, self.busy)
        time.sleep(0.01)  # so that several are at work
        with self.lock:
            self.busy -= 1
        return self._complete(json.loads(request.content), request.headers["authorization"])

    def _complete(self, body: dict[str, Any], key: str) -> httpx.Response:
        ids = body["prompt"]
        at, values = self.known[tuple(ids)]
        with self.lock:
            self.asked[at] += 1
            first = self.asked[at] == 1
        fault = self.faults.get(at, "")
        if fault in ONCE and first:
            if isinstance(ONCE[fault], Exception):
                raise ONCE[fault]
            return ONCE[fault]
        if fault == "too long":
            return httpx.Response(400, text=json.dumps({"error": f"maximum length; {key}"}))
        if fault == "moved":
            return httpx.Response(307, text="{}", headers={"Location": "http://127.0.0.1:2/v1/completions"})
        if fault == "no value":
            values = [*values[:-1], None]
        if fault == "lie":
            ids = [*ids[:-1], ids[-1] + 1]
        return httpx.Response(200, json={"choices": [choice_of(ids, values, body)]})


def choice_of(ids: list[int], values: list[float | None], body: dict[str, Any]) -> dict[str, Any]:
    if body.get("echo"):
        more = body["max_tokens"]
        tokens = [f"token_id:{token}" for token in [*ids, *[5] * more]]
        return {"logprobs": {"tokens": tokens, "token_logprobs": [*values, *[-1.0] * more]}}
    entries = [{str(t): {"logprob": v}, str(t + 9): {"logprob": -0.5}} for t, v in zip(ids, values, strict=True)]
    return {"prompt_logprobs": [None, *entries[1:]], "text": "!"}


@contextlib.contextmanager
def served(answers: Sequence[dict[str, Any]], faults: dict[int, str] | None = None) -> Iterator[tuple[str, Prompts]]:
    """The address of a server, and what it was asked."""
    prompts, client = Prompts(answers, faults or {}), httpx.Client
    transport = httpx.MockTransport(prompts.answer)
    with mock.patch.object(httpx, "Client", lambda **given: client(transport=transport, **given)):
        yield URL, prompts
