"""The page as a web server on one address, which calls nothing else."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from coup_fast.app.bench import Bench

UPLOAD = 32 * 2**20  # bytes
# Gradio and the libraries below it read these when they are imported.
OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# A browser loads nothing for the page from anywhere else, whatever gradio's files may say.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # of gradio, which builds functions
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)


def serve(bench: Bench, listener: socket.socket) -> None:
    """Serve the page on a bound socket until the process is told to stop; then delete uploads."""
    with tempfile.TemporaryDirectory(prefix="coup_fast_app_") as folder:
        os.environ.update(OFFLINE, GRADIO_TEMP_DIR=folder)
        import uvicorn

        config = uvicorn.Config(
            web_app(bench), log_level="warning", lifespan="on", timeout_graceful_shutdown=1
        )
        # Uvicorn ends as the process would by the signal that it got; with this one, after `with`.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        uvicorn.Server(config).run(sockets=[listener])


def web_app(bench: Bench) -> Any:
    """The ASGI application of the page."""
    import gradio as gr
    from fastapi import FastAPI

    from coup_fast.app.page import build

    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OnlyFromHere)
    gr.mount_gradio_app(
        app,
        build(bench),
        path="/",
        theme=theme,
        css_paths=[Path(__file__).parent / "style.css"],
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )
    return app


class OnlyFromHere:
    """ASGI middleware: tells browsers that the page loads and calls nothing but this server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
