"""``dualstream space``: try it in a browser, on this machine alone; or export the Space."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from dualstream.cli import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments."""
    parser.add_argument(
        "--model",
        action="append",
        default=None,
        metavar="NAME",
        help="an embedded model, a Hub id or a local folder; may be given several times (default: the embedded ones)",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, mps (default: an accelerator if there is one)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any free one (default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open a browser")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write a folder to push as a Space, and end")


def run(args: argparse.Namespace) -> Result:
    """Serve until interrupted, or export."""
    if args.export is not None:
        from .export import export_space

        files = export_space(args.export)
        return Result({"folder": str(args.export), "files": files}, f"{args.export} can be pushed as a Space")
    if find_spec("gradio") is None:
        raise ValueError("the Space needs Gradio: pip install 'dualstream[space]' (it takes pillow below 13).")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must lie within 0..65535, got {args.port}.")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from dualstream.modeling.auto import EMBEDDED_MODELS

    from .app import serve
    from .workbench import Workbench

    names = args.model or list(EMBEDDED_MODELS)
    bench = Workbench(names, args.device, args.dtype)
    app, address, _ = serve(
        bench,
        server_name=args.host,
        server_port=args.port or _free_port(args.host),
        inbrowser=args.open,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"open {address} (Ctrl+C ends it)", file=sys.stderr, flush=True)
    app.blocks.block_thread()
    return Result({"address": address, "models": names}, f"{address} has ended")


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
