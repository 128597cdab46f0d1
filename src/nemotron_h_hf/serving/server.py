"""uvicorn around the application: one process, an orderly end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import uvicorn
from sse_starlette.sse import AppStatus

from .api import MOST_BODY, make_app
from .engine import Engine
from .metrics import Metrics


def run(
    engine: Engine,
    metrics: Metrics,
    host: str,
    port: int,
    *,
    keys: Sequence[str] = (),
    most_body: int = MOST_BODY,
    drain: float = 30,
) -> int:
    """Listen until SIGINT or SIGTERM. Then nothing new is taken, and what runs has `drain` seconds to finish.

    Nothing of a request is logged: no path, prompt or key.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    AppStatus.disable_automatic_graceful_drain()  # it would cut streams off at the signal
    app = make_app(engine, metrics, keys=keys, most_body=most_body, drain=0)
    config = uvicorn.Config(
        app, host=host, port=port, access_log=False, log_level="warning", timeout_graceful_shutdown=max(1, round(drain))
    )
    listening = config.bind_socket()
    listening.listen(config.backlog)  # who comes before the start waits
    print(f"listening on http://{_shown(listening)}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
