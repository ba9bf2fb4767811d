"""Ask a server for the log-probabilities of every document: many requests at a time, each answer kept as it comes."""

import fcntl
import os
import random
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

import numpy as np
import orjson

from xkd_pipeline.served.rows import Given, parse
from xkd_pipeline.served.stage import named_teacher, take
from xkd_pipeline.tables.shard import documents_of, encoder_for
from xkd_pipeline.tables.writer import Outcome
from xkd_schemas.cache.table import Table
from xkd_schemas.config import RunConfig, ServedSection
from xkd_schemas.durable_files import disk, disk_errors, save_file
from xkd_schemas.errors import BadData, Busy, InputMissing, UsageError
from xkd_schemas.progress import Progress
from xkd_schemas.signals import Signal
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import OK, NotUsable, Tokens

AGAIN: Final = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
OF_THE_DOCUMENT: Final = (400, 413, 422)  # statuses that refuse this document; any other ends the command
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds between two tries at most: doubled with each, and never less than what the server wants."""
NOBODY: Final = "-"  # in the place of an address: prompts are written, and no server is asked
TOLD: Final = 5  # refused documents that the last line names; the others are in what --json prints
WANTED: Final = (Signal("target_logprob"),)


@dataclass(kw_only=True)
class Server:
    """An OpenAI-compatible server that gives the log-probabilities of a prompt."""

    settings: ServedSection
    client: Any  # httpx.Client
    resume: float = 0.0  # of time.monotonic(): not before does the server want to be asked again
    stopped: threading.Event = field(default_factory=threading.Event)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the server answers, asked again while that may help.

        Raises:
            NotUsable: It refuses what was asked, and may answer something else.
            InputMissing: It refuses everything, or gave no answer after all tries.
        """
        import httpx

        said = ""
        for tries in range(self.settings.retries + 1):
            if self.stopped.wait(max(0.0, self.resume - time.monotonic())):
                break
            try:
                reply = self.client.request(method, path, json=body)
                if reply.status_code == 200:
                    return reply.json()
                said = f"{reply.status_code} {' '.join(reply.text.split())[:160]}"
                if reply.status_code in OF_THE_DOCUMENT:
                    raise NotUsable("not_imported", f"the server says {self._hide(said)}")
                if reply.status_code not in AGAIN:
                    break
                wanted = time.monotonic() + _seconds(reply.headers.get("retry-after"))
                self.resume = max(self.resume, wanted)  # all requests wait, not this one alone
            except (httpx.TransportError, ValueError) as error:  # stalled, dropped, or no JSON
                if isinstance(error, NotUsable):
                    raise
                said = f"{type(error).__name__} {' '.join(str(error).split())[:160]}"
            self.stopped.wait(min(LONGEST_WAIT, FIRST_WAIT * 2**tries) * random.uniform(0.5, 1.0))
        raise InputMissing(
            f"{self.settings.url}: no answer: {self._hide(said)}",
            kept="every answer so far",
            fix=f"check the address and the key in {self.settings.key_variable}, then run the same command again",
        )

    def _hide(self, said: str) -> str:
        """What a server said, without the key."""
        key = os.environ.get(self.settings.key_variable)
        return said.replace(key, "***") if key else said

    def rate(self, doc_id: str, tokens: Tokens) -> bytes:
        """The line of one document; NotUsable where the answer is of other tokens or lacks a value."""
        body = {"model": self.settings.model, "prompt": tokens.ids.tolist(), "max_tokens": 1, "temperature": 0}
        if self.settings.echo:
            body |= {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        else:
            body |= {"prompt_logprobs": 1, "return_token_ids": True}
        answer = self.call("POST", "completions", body)
        try:
            row = _row_of(answer["choices"][0], tokens)
        except (LookupError, TypeError, AttributeError) as error:
            raise NotUsable("not_imported", f"the answer has no log-probabilities of the prompt: {error}") from error
        served = parse(row)
        take(served, tokens, WANTED)
        values_T = served.columns["target_logprob"]
        found = {"doc_id": doc_id, "token_ids": tokens.ids, "logprobs": np.append(np.float32(np.nan), values_T[:-1])}
        return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"


def _row_of(choice: Given, tokens: Tokens) -> Given:
    """The row of an answer; with echo, entries name their token as "token_id:7", and one more may be generated."""
    ids = choice.get("prompt_token_ids") or tokens.ids
    entries = choice.get("prompt_logprobs")
    if entries is None:
        told = choice["logprobs"]
        pairs = zip(told["tokens"], told["token_logprobs"], strict=True)
        entries = [{token.removeprefix("token_id:"): value} for token, value in pairs]
        entries = entries[:-1] if len(entries) == len(tokens.ids) + 1 else entries
    return {"token_ids": ids, "prompt_logprobs": entries}


def _seconds(retry_after: str | None) -> float:
    """Seconds that a server wants us to wait, at most a day; 0 where it names no number of them.

    >>> _seconds("2"), _seconds(None), _seconds("Wed, 21 Oct 2015 07:28:00 GMT"), _seconds("nan")
    (2.0, 0.0, 0.0, 0.0)
    """
    with suppress(ValueError):
        return min(86400.0, max(0.0, float(retry_after or "")))
    return 0.0


@contextmanager
def open_answers(path: Path) -> Iterator[tuple[IO[bytes], set[str]]]:
    """The file that answers are appended to, and the documents that it has; a line that a kill cut off is removed.

    Busy where another process writes to it, BadData where it holds something else.
    """
    with disk_errors(path), path.open("ab+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{path} is being written by another process", fix="wait for it, then run this again") from None
        stream.seek(0)
        done, end = set(), 0
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                done.add(orjson.loads(line)["doc_id"])
            except (ValueError, LookupError, TypeError) as error:
                raise BadData(f"{path}, byte {end}: no answer of a server", fix="name another --out") from error
            end += len(line)
        stream.truncate(end)
        yield stream, done
        stream.flush()
        disk.fsync(stream.fileno())


def ask(run: RunConfig, out: Path) -> Outcome:
    """Ask for every document that `out` does not have yet; what is refused is told, and asked again the next time.

    Raises:
        UsageError: The address is none, or the server has several models and none is named.
        InputMissing: The server gives no answer.
        BadData: More documents are refused than `documents.max_reject` allows.
    """
    import httpx

    served, root = run.served, Path(run.cache)
    address = urlsplit(served.url if served.url != NOBODY else "http://nobody")
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        raise UsageError(
            "the address of the server is not http://HOST:PORT/v1",
            fix=f"leave names, passwords and keys out of it: the key is read from {served.key_variable}",
        )
    documents, (tokenizer, settings) = Table(root, "documents"), named_teacher(run)
    encoder = encoder_for(tokenizer, settings, documents)
    if served.url == NOBODY:
        return _write_prompts(documents, encoder, out)
    key = os.environ.get(served.key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=served.requests)
    refused: dict[str, str] = {}
    with (
        httpx.Client(base_url=served.url, headers=headers, timeout=served.timeout, limits=limits) as client,
        open_answers(out) as (stream, done),
        Progress("ask", len(documents), of="documents") as progress,
    ):
        server = Server(settings=served, client=client)
        if not served.model:
            server.settings = served.model_copy(update={"model": _only_model(server)})
        before = len(done)
        with closing(_answers(server, _texts(documents, encoder, done))) as answers:
            for doc_id, future in answers:
                try:
                    stream.write(future.result())
                    stream.flush()
                except NotUsable as error:
                    refused[doc_id] = str(error)
                    _check_refused(refused, run.documents.max_reject, len(documents), out)
                progress.reach(len(done))
    answered = len(done) - before - len(refused)
    values = {"out": str(out), "answered": answered, "there": before, "refused": refused}
    told = [f"{doc_id} refused: {why}" for doc_id, why in islice(refused.items(), TOLD)]
    told += [f"{len(refused) - TOLD} more refused"] if len(refused) > TOLD else []
    line = "; ".join([f"{out}: {answered} documents answered, {before} were there", *told])
    return Outcome(line=line, values=values)


def _texts(documents: Table, encoder: Encoder, done: set[str]) -> Iterator[tuple[str, Tokens]]:
    """Documents that are not done, with their tokens; equal texts once. They are added to `done`."""
    for number in range(len(documents.manifest.commits)):
        rows = documents_of(documents.shard(number))
        for doc_id, tokens in zip(rows.doc_ids, encoder.encode_batch(rows.block), strict=True):
            if tokens.status == OK and doc_id not in done:
                done.add(doc_id)
                yield doc_id, tokens


def _write_prompts(documents: Table, encoder: Encoder, out: Path) -> Outcome:
    """Write what a server would be asked, for programs that run without one."""
    done: set[str] = set()

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            for doc_id, tokens in _texts(documents, encoder, done):
                row = {"doc_id": doc_id, "token_ids": tokens.ids}
                stream.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    save_file(out, write)
    return Outcome(line=f"{out}: {len(done)} prompts", values={"out": str(out), "prompts": len(done)})


def _check_refused(refused: Mapping[str, str], most: float, documents: int, out: Path) -> None:
    """BadData where more documents are refused than the share `most`."""
    if len(refused) > most * documents:
        first = ": ".join(next(iter(refused.items())))
        raise BadData(
            f"{len(refused)} documents are refused, more than --max-reject {most:g} allows; the first: {first}",
            kept=f"every answer, in {out}",
            fix="check that the server has this tokenizer's model and gives prompt_logprobs, or try --echo",
        )


def _answers(server: Server, jobs: Iterator[tuple[str, Tokens]]) -> Generator[tuple[str, "Future[bytes]"]]:
    """Documents with their finished answers, in the order in which these come; requests end where the reader ends."""
    names: dict[Future[bytes], str] = {}
    with ThreadPoolExecutor(server.settings.requests) as pool:
        try:
            for doc_id, tokens in jobs:
                names[pool.submit(server.rate, doc_id, tokens)] = doc_id
                if len(names) >= 2 * server.settings.requests:
                    for future in wait(names, return_when=FIRST_COMPLETED).done:
                        yield names.pop(future), future
            for future in as_completed(list(names)):
                yield names.pop(future), future
        finally:
            server.stopped.set()
            server.client.close()
            pool.shutdown(cancel_futures=True)


def _only_model(server: Server) -> str:
    """The model that a server lists; UsageError where there are several, or it lists none."""
    names: list[str] = []
    with suppress(NotUsable, LookupError, TypeError):
        names = [str(one["id"]) for one in server.call("GET", "models")["data"]]
    if len(names) != 1:
        raise UsageError(f"the server has models {', '.join(names) or 'none'}", fix="name one with --served-model")
    return names[0]
