"""Serve a page on which one attacks and purifies pictures and watches.

Choose a digit or a photograph, or upload a picture; attack it (weakly) or not; choose the method
and its settings. The page shows the picture after every step, the classifier's probabilities
before and after, and the time of a step. It is served on this machine (--host, --port) and calls
nothing outside of it: no analytics, no share link, no fonts from elsewhere. Uploads are deleted
when the command ends. One picture is purified at a time; further requests wait.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from coup_fast.cli import common, networks
from coup_fast.cli.common import CommandError

if TYPE_CHECKING:
    import torch

    from coup_fast.app.bench import Bench

HELP = "serve a page on which to try attacks and purification"
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CLASSES = {"mnist": tuple("0123456789"), "cifar10": tuple(_CIFAR10.split())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `coup-fast app`."""
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to serve on (default: 127.0.0.1, reached from this machine only)",
    )
    add("--port", type=_port, default=7860, help="default: 7860; 0: any free port")
    networks.add_arguments(parser)
    common.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    common.require("app", "gradio", "PIL", "safetensors")
    device = common.choose_device(args.device)
    with _listen(args.host, args.port) as listener:
        bench = _bench(args, device)
        if not _is_loopback(args.host):
            common.say(
                f"warning: --host {args.host} lets every machine that reaches this one use the "
                "page, and it asks for no password"
            )
        from coup_fast.app.server import serve

        shown = f"[{args.host}]" if ":" in args.host else args.host
        common.say(f"http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it)")
        serve(bench, listener)
    return 0


def _bench(args: argparse.Namespace, device: torch.device) -> Bench:
    """The networks that the options name, with what is known about them."""
    from coup_fast.app.bench import Bench
    from coup_fast.models.bundled import bundled_settings

    args.method = "coup"  # whose score network `load` takes
    loaded = networks.load(args, device)
    bench = Bench(
        score_models=(loaded.score_model,),
        classifier=loaded.classifier,
        channels=loaded.channels,
        size=loaded.size,
        name=str(args.score),
        device=device,
    )
    if args.score is None:
        chosen = bundled_settings(args.bundled)
        own = "" if args.classifier is None else f", classifier {args.classifier}"
        bench = replace(
            bench,
            score_models=(
                loaded.score_model,
                networks.load_bundled(args.bundled, "adp", device)[0],
            ),
            name=f"bundled {args.bundled} networks{own}",
            settings=chosen["methods"],
            epsilon=_as_written(chosen["epsilon"]),
            classes=_CLASSES[args.bundled] if args.classifier is None else (),
        )
    if not bench.methods:
        raise CommandError(f"there is no method for the score network {args.score}")
    return bench


def _as_written(epsilon: float) -> str:
    """A radius as one writes it: a whole number of 255ths as such, "8/255"."""
    levels = round(255 * epsilon)
    return f"{levels}/255" if abs(epsilon - levels / 255) < 1e-9 else f"{epsilon:g}"


def _port(text: str) -> int:
    port = common.non_negative_int(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"must be a port, 0 to 65535, got {text!r:.60}")
    return port


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises CommandError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno is None:
            reason = error.strerror  # os.strerror knows nothing of names of hosts
        else:
            reason = os.strerror(error.errno)  # shorter than that of create_server
        cure = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise CommandError(f"--host {host} --port {port}: {reason}{cure}") from None
