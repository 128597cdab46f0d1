"""OpenAI's routes over an engine.

/v1/models  /v1/completions  /v1/chat/completions  /v1/responses     /health  /metrics  /status     / a page for people
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from sse_starlette.sse import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from .answers import Writer, chat_writer, completion_writer
from .engine import Engine
from .failures import Failure, failure_of
from .limits import Limits
from .metrics import Metrics
from .pieces import Pieces
from .protocol import Body, ChatBody, CompletionBody
from .responses import ResponseBody, response_writer

PAGE = Path(__file__).parents[1] / "assets" / "serve.html"
MOST_BODY = 16 * 2**20
PING = 10  # seconds between comments while nothing comes


def make_app(
    engine: Engine, metrics: Metrics, *, keys: Sequence[str] = (), most_body: int = MOST_BODY, drain: float = 30
) -> FastAPI:
    """The application; it starts the engine, and stops it when the server has ended.

    Args:
        keys: API keys; none lets everybody in.
        most_body: bytes of a request.
        drain: seconds that running requests have when the server ends.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop, drain)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Limits, most=most_body, keys=keys)
    for kind in (RequestValidationError, Exception, HTTPException):
        app.add_exception_handler(kind, _say)
    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _models(engine, created)}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = next((it for it in _models(engine, created) if it["id"] == name), None)
        if found is None:
            raise _unknown(engine, name)
        return found

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(engine, body, request, completion_writer)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await _answer(engine, body, request, chat_writer)

    @app.post("/v1/responses")
    async def responses(body: ResponseBody, request: Request) -> Response:
        return await _answer(engine, body, request, response_writer)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        alive = engine.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return engine.status()

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html")

    return app


async def _answer(engine: Engine, body: Body, request: Request, make: Any) -> Response:
    try:
        budgets = _budgets(engine, body)
        writer: Writer = await run_in_threadpool(make, engine, body, budgets)
        pieces = Pieces(asyncio.get_running_loop())
        await run_in_threadpool(pieces.submit, engine, writer.requests)
    except Exception as error:
        raise failure_of(error, body.said_as()) from None
    async with _heard(request, pieces):
        if body.stream:
            await pieces.begun(PING)  # what fails before its first token has a status
            let_go = BackgroundTask(pieces.cancel)  # also if the client goes before the first event
            return EventSourceResponse(_events(writer, pieces), ping=PING, sep="\n", background=let_go)
        async for number, piece in pieces:
            writer.add(number, piece)
        return JSONResponse(writer.whole(pieces.num_cached()))


async def _events(writer: Writer, pieces: Pieces) -> AsyncIterator[dict[str, str]]:
    try:
        for chunk in writer.begin():
            yield _event(chunk)
        async for number, piece in pieces:
            for chunk in writer.chunks(number, piece):
                yield _event(chunk)
        for chunk in writer.end(pieces.num_cached()):
            yield _event(chunk)
    except Exception as error:
        yield _event(failure_of(error).body)
    finally:
        pieces.cancel()
    yield {"data": "[DONE]"}


@asynccontextmanager
async def _heard(request: Request, pieces: Pieces) -> AsyncIterator[None]:
    """Until the answer begins: let go of what nobody waits for, and say what failed."""
    watch = asyncio.create_task(_cancel_when_gone(request, pieces))
    try:
        yield
    except Exception as error:
        pieces.cancel()
        raise failure_of(error) from None
    except asyncio.CancelledError:
        pieces.cancel()
        raise
    finally:
        watch.cancel()


async def _cancel_when_gone(request: Request, pieces: Pieces) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)
    pieces.give_up(Failure(499, "the client has gone"))


def _budgets(engine: Engine, body: Body) -> tuple[Any, Any]:
    try:
        first, then = engine.budgets.split(body.model)
    except KeyError:
        raise _unknown(engine, body.model) from None
    if body.budget is not None:
        if first is not None:
            raise Failure(400, f"budget={body.budget!r} and model={body.model!r}: allowed is one budget", "budget")
        try:
            first, then = engine.budgets.split(f"{body.model}:{body.budget}")
        except KeyError:
            raise Failure(400, f"budget={body.budget!r}: allowed is NAME, SIZE or SMALL>LARGE", "budget") from None
    for name in filter(None, (first, then)):
        try:
            engine.budgets.find(name)
        except ValueError as error:
            if body.budget is not None:
                raise Failure(400, str(error), "budget") from None
            raise _unknown(engine, body.model, f" ({error})") from None
    return first, then


def _models(engine: Engine, created: int) -> list[dict[str, Any]]:
    root = engine.budgets.name
    return [
        {
            "object": "model", "created": created, "owned_by": "nemotron-h-hf", "root": root,
            "parent": None if facts["id"] == root else root, "max_model_len": engine.max_context,
            "chat": bool(engine.tokenizer.chat_template), **facts,
        }
        for facts in engine.budgets.describe()
    ]  # fmt: skip


def _unknown(engine: Engine, name: str, why: str = "") -> Failure:
    root = engine.budgets.name
    ids = [root, *(f"{root}:{budget}" for budget in engine.budgets.named)]
    more = f", {root}:SIZE such as {root}:7GiB@32Ki, {root}:SMALL>LARGE" if engine.budgets.named else ""
    return Failure(404, f"model={name!r}{why}: allowed are {', '.join(ids)}{more}", "model", "model_not_found")


async def _say(_request: Request, error: Exception) -> JSONResponse:
    return failure_of(error).response()


def _event(chunk: dict[str, Any]) -> dict[str, str]:
    name = {"event": chunk["type"]} if "type" in chunk else {}
    return {**name, "data": json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))}
