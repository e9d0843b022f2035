"""A small HTTP service: one base, an adapter for each tenant, one batch for all of them.

The API key says who the tenant is, the registry says which adapter answers; nothing else in a request has a say. What
cannot be done in time is refused: 429 where the queue is full, 503 at the deadline and while the service stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import queue
import random
import socket
import threading
import time
from dataclasses import dataclass, field

from fastapi import FastAPI, Request  # at the top: FastAPI looks a handler's annotations up here
from fastapi.responses import JSONResponse, PlainTextResponse

from course_lib import CourseError
from course_lib.registry import BASE, Registry, RegistryError


@dataclass(frozen=True)
class Limits:
    """What the service promises, and what it asks of a request. Times in seconds."""

    queue: int = 16  # requests that may wait
    batch: int = 8  # rows of one batch
    timeout: float = 20.0  # from arrival to answer, whatever the answer is
    grace: float = 5.0  # what the batch at work still gets when the service stops
    body_timeout: float = 5.0  # to send a body
    max_new_tokens: int = 64
    max_chars: int = 2000
    max_body: int = 16384  # bytes


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a batch: token ids of its prompt, and its adapter."""

    ids: list[int]
    adapter: str


class Engine:
    """One base model and the adapters on it. Only one thread may call `answer`; adapters are loaded when first needed.

    max_loaded: adapters that are kept; beyond that, the one that was not used for longest goes.
    """

    def __init__(self, model, tokenizer, registry: Registry, max_loaded: int = 8):
        self.base, self.model, self.tokenizer, self.registry = model, model, tokenizer, registry
        self.max_loaded, self.slots, self._count = max_loaded, {}, 0  # slots: id -> PEFT's name, oldest use first

    def prompt(self, text: str, adapter: str) -> list[int]:
        """Token ids of a message under the system prompt that its adapter was trained with."""
        system = "" if adapter == BASE else self.registry.entry(adapter)["system"]
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(chat, add_special_tokens=False)["input_ids"]

    def load(self, adapter: str, keep=()) -> str:
        """PEFT's name of an adapter that is loaded now, after its files were compared with the registry's hashes."""
        if adapter == BASE:
            return BASE
        if adapter not in self.slots:
            from peft import PeftModel

            folder, name = str(self.registry.verify(adapter)), f"slot{self._count}"
            self._count += 1
            if self.model is self.base:
                options = {"adapter_name": name, "autocast_adapter_dtype": False}
                self.model = PeftModel.from_pretrained(self.base, folder, **options).eval()
            else:
                self.model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
                self.model.eval()
            self.slots[adapter] = name
            for old in [id for id in self.slots if id not in keep and id != adapter]:
                if len(self.slots) > self.max_loaded:
                    self.model.delete_adapter(self.slots.pop(old))
        self.slots[adapter] = self.slots.pop(adapter)
        return self.slots[adapter]

    def answer(self, rows: list[Row], max_new_tokens: int, ended=None) -> list[tuple[str, int] | Exception]:
        """(text, new tokens) of each row, greedy, all rows in one mixed batch; the error where its adapter cannot be
        loaded. ended: a function that says for each row whether to give it up, asked before every token."""
        import torch

        names, found = {}, [None] * len(rows)
        for i, row in enumerate(rows):
            try:
                names[i] = self.load(row.adapter, keep={r.adapter for r in rows})
            except (CourseError, OSError, RuntimeError, ValueError) as error:
                found[i] = error
        if not names:
            return found
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        width = max(len(rows[i].ids) for i in names)
        ids = torch.tensor([[pad] * (width - len(rows[i].ids)) + rows[i].ids for i in names])
        mask = torch.tensor([[0] * (width - len(rows[i].ids)) + [1] * len(rows[i].ids) for i in names])
        options = {} if self.model is self.base else {"adapter_names": list(names.values())}
        if ended is not None:
            at = list(names)

            def give_up(ids, scores, **kwargs):
                over = ended()
                return torch.tensor([over[i] for i in at], device=ids.device)

            options["stopping_criteria"] = [give_up]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.base.device),
                attention_mask=mask.to(self.base.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=pad,
                **options,
            )[:, width:].tolist()
        for i, new in zip(names, out, strict=True):
            if end in new:
                new = new[: new.index(end)]
            found[i] = (self.tokenizer.decode(new, skip_special_tokens=True), len(new))
        return found


# --- the service -----------------------------------------------------------------------------------------------------


class Refused(Exception):
    """An answer other than 200, with its reason."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason


@dataclass(eq=False)
class _Job:
    tenant: str
    row: Row
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future
    arrived: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        return self.future.done() or time.monotonic() >= self.deadline

    def settle(self, result) -> None:
        """Called from any thread: hand a (text, tokens) or an exception to the request that waits."""

        def put():
            if not self.future.done():
                (self.future.set_exception if isinstance(result, Exception) else self.future.set_result)(result)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(put)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Service:
    """The service around an engine: `app` is the ASGI application, `stop` ends it with every request answered.

    keys: {API key: tenant}; only their hashes are kept. operator_key opens /metrics, which names all tenants.
    """

    def __init__(
        self, engine: Engine, keys: dict[str, str], operator_key: str, limits: Limits | None = None, seed=None
    ):
        self.engine, self.registry, self.limits = engine, engine.registry, limits or Limits()
        self.tenants = {_hashed(key): tenant for key, tenant in keys.items()}
        self.operator = _hashed(operator_key)
        if self.operator in self.tenants:
            raise CourseError("the operator's key is a tenant's as well: give each its own.")
        self.special = [token for token in engine.tokenizer.all_special_tokens if token]
        self.waiting: queue.Queue[_Job] = queue.Queue(self.limits.queue)
        self.closing, self.abort = threading.Event(), threading.Event()
        self._gate, self._random, self._worker = threading.Lock(), random.Random(seed), None
        self._make_metrics()
        self.app = self._make_app()

    def _make_metrics(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.metrics = kept = CollectorRegistry()
        seconds = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
        self.requests = Counter("requests", "answers by tenant and status", ["tenant", "status"], registry=kept)
        self.latency = Histogram("latency_seconds", "arrival to answer 200", ["tenant"], registry=kept, buckets=seconds)
        self.depth = Gauge("queue_depth", "requests that wait", registry=kept)
        self.rows = Histogram("batch_rows", "rows of a batch", registry=kept, buckets=(1, 2, 4, 8, 16, 32))
        self.mixed = Histogram("batch_adapters", "adapters in a batch", registry=kept, buckets=(1, 2, 3, 4, 8))
        self.tokens = Counter("tokens", "tokens written, by adapter", ["adapter"], registry=kept)
        self.incidents = Counter("adapter_incidents", "adapters that could not be used", ["adapter"], registry=kept)
        self.depth.set_function(self.waiting.qsize)

    # --- a request

    def _make_app(self):
        from prometheus_client import generate_latest

        @contextlib.asynccontextmanager
        async def lifespan(app):
            self.start()
            yield
            await asyncio.to_thread(self.stop)

        # No pages about itself: a service for tenants need not tell its schema.
        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

        @app.post("/v1/answer")
        async def answer(request: Request):
            started, tenant = time.monotonic(), "unknown"
            try:
                tenant = self.tenant(request)
                row = await self._read(request, tenant)
                text, tokens = await self._wait(tenant, row, started)
                status, body = 200, {"adapter": row.adapter, "text": text, "tokens": tokens}
                self.latency.labels(tenant).observe(time.monotonic() - started)
            except Refused as refused:
                status, body = refused.status, {"error": refused.reason}
            self.requests.labels(tenant, status).inc()
            retry = {"Retry-After": "1"} if status in (429, 503) else {}
            return JSONResponse(body, status, headers=retry)

        @app.get("/health")
        async def health():
            ready = not self.closing.is_set() and self._worker is not None and self._worker.is_alive()
            return JSONResponse({"ready": ready}, 200 if ready else 503)

        @app.get("/metrics")
        async def metrics(request: Request):
            try:
                found = self._key(request)
                if found != self.operator:
                    raise Refused(403 if found in self.tenants else 401, "the metrics are for the operator alone")
            except Refused as refused:
                return JSONResponse({"error": refused.reason}, refused.status)
            return PlainTextResponse(generate_latest(self.metrics).decode())

        return app

    def _key(self, request) -> str:
        """Hash of the one bearer key of a request."""
        sent = request.headers.getlist("authorization")
        kind, _, key = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        if kind.lower() != "bearer" or not key.strip():
            raise Refused(401, "send one header: Authorization: Bearer KEY")
        return _hashed(key.strip())

    def tenant(self, request) -> str:
        """Who asks: by the key alone. Look-up by hash, so that timing tells nothing about the keys."""
        tenant = self.tenants.get(self._key(request))
        if tenant is None:
            raise Refused(401, "this key is not known")
        return tenant

    async def _read(self, request, tenant: str) -> Row:
        limits = self.limits
        if request.url.query:
            raise Refused(400, "no parameters are taken in the address")
        body, declared = b"", request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limits.max_body:
            raise Refused(413, f"the body may have {limits.max_body} bytes")
        try:
            async with asyncio.timeout(limits.body_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.max_body:
                        raise Refused(413, f"the body may have {limits.max_body} bytes")
        except TimeoutError:
            raise Refused(408, f"the body did not come within {limits.body_timeout:g} s") from None
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(sent, dict) or set(sent) != {"text"} or not isinstance(sent["text"], str):
            raise Refused(422, 'send exactly {"text": "..."}: the key says who you are and which adapter is yours')
        text = sent["text"]
        if not text.strip():
            raise Refused(422, "the text is empty")
        if len(text) > limits.max_chars:
            raise Refused(413, f"the text has {len(text)} characters, at most {limits.max_chars} are taken")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise Refused(422, "the text holds half a character (a lone surrogate)")
        if held := next((token for token in self.special if token in text), None):
            raise Refused(422, f"the text holds {held}, a control token of the model")
        try:
            adapter = self.registry.route(tenant, self._random.random())
            row = Row(self.engine.prompt(text, adapter), adapter)
        except RegistryError:
            raise Refused(503, "no adapter is ready for you") from None
        if len(row.ids) + limits.max_new_tokens > self.engine.base.config.max_position_embeddings:
            raise Refused(413, f"the text has {len(row.ids)} tokens, too many for the model")
        return row

    async def _wait(self, tenant: str, row: Row, started: float):
        loop = asyncio.get_running_loop()
        job = _Job(tenant, row, started + self.limits.timeout, loop, loop.create_future(), started)
        with self._gate:  # after `closing` is set, nothing enters the queue any more
            if self.closing.is_set():
                raise Refused(503, "the service is stopping")
            try:
                self.waiting.put_nowait(job)
            except queue.Full:
                raise Refused(429, "too many requests wait already: try again later") from None
        try:
            return await asyncio.wait_for(job.future, max(0.0, job.deadline - time.monotonic()))
        except TimeoutError:
            raise Refused(503, f"not answered within {self.limits.timeout:g} s") from None

    # --- the worker

    def start(self) -> None:
        """Start the one thread that works on batches."""
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="batches", daemon=True)
            self._worker.start()

    def stop(self) -> None:
        """Take nothing more; who waits gets 503 now; the batch at work gets `grace` seconds, then its rows get 503."""
        with self._gate:
            self.closing.set()
        self._empty()
        if self._worker is not None and self._worker.is_alive():
            self._worker.join(self.limits.grace)
            self.abort.set()
            self._worker.join(60)
        self._empty()

    def _empty(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.waiting.get_nowait().settle(Refused(503, "the service is stopping"))

    def _work(self) -> None:
        while not self.closing.is_set():
            try:
                jobs = [self.waiting.get(timeout=0.05)]
            except queue.Empty:
                continue
            with contextlib.suppress(queue.Empty):
                while len(jobs) < self.limits.batch:
                    jobs.append(self.waiting.get_nowait())
            self._batch([job for job in jobs if not job.over()])

    def _batch(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        self.rows.observe(len(jobs))
        self.mixed.observe(len({job.row.adapter for job in jobs}))

        def ended():
            return [self.abort.is_set() or job.over() for job in jobs]

        try:
            found = self.engine.answer([job.row for job in jobs], self.limits.max_new_tokens, ended)
        except Exception:  # a fault of one batch must not end the thread that serves all
            found = [Refused(500, "the model failed on this batch")] * len(jobs)
        for job, result in zip(jobs, found, strict=True):
            if isinstance(result, tuple):
                self.tokens.labels(job.row.adapter).inc(result[1])
                if self.abort.is_set():  # the text may be cut off
                    result = Refused(503, "the service is stopping")
                elif time.monotonic() >= job.deadline:
                    result = Refused(503, f"not answered within {self.limits.timeout:g} s")
            elif not isinstance(result, Refused):
                self.incidents.labels(job.row.adapter).inc()
                result = Refused(503, "your adapter cannot be used at the moment")
            job.settle(result)


class Server:
    """The service behind a real socket of this machine, in a thread: `with Server(service) as url`.

    The port is whatever is free. On leaving, the service stops first, so that every request has its answer before the
    connections are closed.
    """

    def __init__(self, service: Service):
        import uvicorn

        self.service = service
        config = uvicorn.Config(
            service.app, log_level="critical", access_log=False, lifespan="on", timeout_graceful_shutdown=5, backlog=512
        )
        self.server, self.thread, self.socket = uvicorn.Server(config), None, None

    def __enter__(self) -> str:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until = time.monotonic() + 30
        while not self.server.started:
            if not self.thread.is_alive() or time.monotonic() > until:
                raise CourseError("the service did not start: is another event loop or firewall in the way?")
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *error) -> None:
        self.service.stop()
        self.server.should_exit = True
        self.thread.join(30)
        if self.thread.is_alive():
            self.server.force_exit = True
            self.thread.join(5)
        self.socket.close()


# --- its clients -----------------------------------------------------------------------------------------------------

MOST_CALLS = 1000


@dataclass(frozen=True)
class Reply:
    """What a client saw: the HTTP status (None where no answer came), seconds, the body's table, where in the calls."""

    status: int | None
    seconds: float
    body: dict
    place: int


def fire(url: str, calls: list[dict], clients: int | None = None, timeout: float = 60.0) -> list[Reply]:
    """Send `calls` to a service on this machine, by so many clients at once (all together where no number is given).

    A call holds `key` and `text`, or arguments of httpx's `request` that replace what is made of them. Runs in a thread
    of its own, because a notebook's thread has an event loop already. Never raises for what a server answers.
    """
    import httpx

    if not url.startswith("http://127.0.0.1:"):
        raise CourseError(f"{url}: load is sent to this machine alone, http://127.0.0.1:PORT.")
    if len(calls) > MOST_CALLS:
        raise CourseError(f"{len(calls)} calls: at most {MOST_CALLS}.")

    async def one(client, place, call, turn):
        async with turn:
            start = time.monotonic()
            request = {"method": "POST", "url": "/v1/answer"} | {
                k: v for k, v in call.items() if k not in ("key", "text")
            }
            if "key" in call:
                request["headers"] = {"Authorization": f"Bearer {call['key']}"} | request.get("headers", {})
            if "text" in call:
                request["json"] = {"text": call["text"]}
            try:
                response = await client.request(**request)
            except httpx.HTTPError as error:
                return Reply(None, time.monotonic() - start, {"error": type(error).__name__}, place)
            try:
                body = response.json()
            except ValueError:
                body = {"raw": response.text}
            return Reply(response.status_code, time.monotonic() - start, body, place)

    async def all_of_them():
        limits, turn = httpx.Limits(max_connections=None), asyncio.Semaphore(clients or max(1, len(calls)))
        async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False) as client:
            return await asyncio.gather(*(one(client, i, call, turn) for i, call in enumerate(calls)))

    found: list[Reply] = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(all_of_them())))
    thread.start()
    thread.join()
    return found
