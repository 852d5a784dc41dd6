"""Load what `demur serve` needs, and serve until told to stop."""

from __future__ import annotations

import importlib.util
import os
import socket
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from demur import progress
from demur.errors import DemurError, InputError, MissingExtraError
from demur.verbs.serve_config import Serve

if TYPE_CHECKING:
    from demur.serve.app import Server
    from demur.serve.guard import App


def serve(config: Serve) -> None:
    """Serve until interrupted. Raises as `load` and `read_offered`, `MissingExtraError` without the extra, and
    `InputError` for a spec that does not fit the model or an address that cannot be listened on."""
    require_serve()
    import uvicorn

    config = replace(config, key=config.key or os.environ.get("DEMUR_API_KEY", "").strip())
    listening = _listen(config)
    with listening:
        server, app = prepare(config)
        host, port = listening.getsockname()[:2]
        names = ", ".join(model.id for model in server.models())
        progress.say(f"serving {names} at http://{host}:{port}/v1 (Ctrl-C stops)")
        if host not in ("127.0.0.1", "::1") and not config.key:
            progress.say("anyone who reaches this address may use it; give --key, or set DEMUR_API_KEY")
        running = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_keep_alive=15, timeout_graceful_shutdown=5
            )
        )
        with suppress(KeyboardInterrupt):  # how people end it
            running.run(sockets=[listening])


def require_serve() -> None:
    """Raises `MissingExtraError` without FastAPI, uvicorn or the Prometheus client."""
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "prometheus_client"))):
        raise MissingExtraError("the server's packages are not installed; run `pip install 'demur[serve]'`")


def prepare(config: Serve) -> tuple[Server, App]:
    """The server and its application; the engine starts with the application. Every spec is tried first."""
    from demur.lm.load import load
    from demur.sae.store import check_fits, load_sae
    from demur.serve.app import Server, make_app
    from demur.serve.engine import Engine
    from demur.serve.metrics import Metrics
    from demur.steering.spec_book import SpecBook, read_offered
    from demur.steering.steer import steer
    from demur.steering.vectors import load_vectors
    from demur.text_gates import check, opened
    from demur.verbs.sides import clamps

    offered = read_offered(config.spec)
    saes = [*map(load_sae, config.sae), *offered.saes]
    if config.latent is not None:
        saes = saes or [load_sae("smollm2-135m-instruct")]
        for one in clamps(config.latent, config.value, saes[0]):
            offered.specs[one.label.replace(" ", "-")] = one.spec
    book = SpecBook(offered.specs, config.default, config.lock)
    directions = [*offered.directions, *load_vectors(config.direction, config.probe)]
    progress.say(f"loading {config.model}")
    lm = load(config.model, config.dtype, config.device, config.revision)
    name = config.name or lm.name
    if name in book.specs or config.model in book.specs:
        raise InputError(f"a spec has the name of the model, {name!r}; rename its file, or give --name")
    for sae in saes:
        check_fits(sae, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    for label, spec in book.specs.items():
        try:
            with steer(lm, opened(spec), saes, directions=directions):
                pass
            check([spec], lm.device)
        except DemurError as error:
            raise InputError(f"the spec {label!r} does not fit: {error}") from error
    metrics = Metrics()
    keep = [opened(spec) for spec in book.specs.values()]
    engine = Engine(lm, saes, directions, config.slots, config.waiting, config.room, keep, metrics)
    server = Server(engine, book, config, name)
    return server, make_app(server, metrics)


def _listen(config: Serve) -> socket.socket:
    """Bound before the model is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
    except OSError as error:
        found.close()
        raise InputError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror or error}); "
            "choose another --port or --host"
        ) from None
    return found
