"""`atv serve`."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from atv import artifact
from atv.cli.engines import check_engine, start_engine
from atv.cli.options import Serve
from atv.config import EMBEDDED_LLM
from atv.errors import ATVError
from atv.lm.identity import public_name
from atv.progress import log

if TYPE_CHECKING:
    from atv.serving.requests import Limits

KEY = "ATV_API_KEY"


def serve_adapters(given: Serve) -> None:
    """Load the LLM and the adapters, and answer requests until Ctrl-C."""
    key = os.environ.get(KEY) or None
    if key is None and not _own(given.host):
        raise ATVError(
            f"--host is {given.host}, where other machines can send requests, and there is no API key; set {KEY} in "
            "the environment, or leave --host out."
        )
    if given.adapters_from is not None and not given.adapters_from.is_dir():
        raise ATVError(f"--adapters-from is {given.adapters_from}; expected a folder.")
    _check(given)
    adapters = dict(map(_named, given.adapter or ()))
    if len(adapters) < len(given.adapter or ()):
        raise ATVError("Two adapters have one name; give each its own as NAME=DIR.")
    try:
        import uvicorn

        from atv.serving.app import KEEP_ALIVE, make_app
        from atv.serving.models import Models
    except ImportError as error:
        raise ATVError(
            f"atv serve needs the package {error.name}; install it with: pip install 'adaptive-task-vectors[serve]'"
        ) from error
    name = given.llm
    if name is None:
        first = next(iter(adapters.values()), None)
        name = EMBEDDED_LLM if first is None else artifact.read(artifact.locate(first)).base_llm["name"]
    listening = _listen(given.host, given.port)  # before the LLM is loaded: a port in use is told at once
    engine = start_engine(name, given.engines, given.loading, _limits(given))
    try:
        models = Models(public_name(name), engine.tokenizer, engine.load, given.adapters_from)
        for each, folder in adapters.items():
            models.add(each, folder)
        host, port = listening.getsockname()[:2]
        address = _address(host, port)
        log.info(
            f"Serving {', '.join(served.name for served in models)} at {address}/v1, with a page at {address} "
            "(stop with Ctrl-C)"
        )
        hosts = ("127.0.0.1", "localhost", "[::1]", given.host)
        app = make_app(engine, models, key=key, hosts=hosts, training_queries=given.training_queries)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=10
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        engine.close()  # vLLM's processes would outlive this one


def _limits(given: Serve) -> "Limits":
    from atv.serving.requests import Limits

    return Limits(
        rows=given.rows,
        waiting=given.waiting,
        tokens=given.tokens,
        answer=given.max_tokens,
        seconds=given.timeout,
        kept=int(given.shared_memory * 2**30),
    )


def _check(given: Serve) -> None:
    """Raise ATVError for options that the chosen engine does not have."""
    check_engine(given.engines, given.loading)
    if given.training_queries and given.engines.engine != "transformers":
        raise ATVError("--training-queries is for --engine transformers, since others do not read them; leave it out.")
    plain = Serve()
    changed = {"--tokens": given.tokens != plain.tokens, "--shared-memory": given.shared_memory != plain.shared_memory}
    for option, differs in changed.items():
        if differs and given.engines.engine == "vllm":
            raise ATVError(
                f"{option} is for --engine transformers and llamacpp. Leave it out; vLLM's own arguments go into "
                "--engine-options."
            )


def _named(adapter: str) -> tuple[str, str]:
    """Split NAME=DIR; the name of DIR alone is its last part. A folder that exists is DIR, whatever its name is."""
    alone = os.path.expanduser(adapter)
    name, equals, folder = adapter.partition("=")
    if equals and not Path(alone).is_dir():
        return name, os.path.expanduser(folder)
    return Path(alone).resolve().name, alone


def _address(host: str, port: int) -> str:
    """Return the URL of a socket's address, with an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        raise ATVError(f"Cannot listen on {host}, port {port}: {error}. Choose another --host or --port.") from error
    return listening
