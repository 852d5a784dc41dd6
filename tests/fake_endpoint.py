"""An OpenAI-compatible endpoint on localhost that says what a test wants."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: Any

    @property
    def text(self) -> str:
        """What was asked: the raw text, or the last turn."""
        text: str = self.body.get("prompt") or self.body["messages"][-1]["content"]
        return text


Answer = Callable[[Request], tuple[int, bytes]]


@contextmanager
def endpoint(answer: Answer, asked: list[Request], location: str = "") -> Iterator[str]:
    """A server whose address is yielded; `asked` gets every request, a GET too."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(body))
            asked.append(request)
            status, reply = answer(request)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Type", "application/json")
            self.send_header("x-should-retry", "false")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def do_GET(self) -> None:
            asked.append(Request(f"followed to {self.path}", {}, None))
            self.send_error(404)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def saying(text: Any) -> bytes:
    """A reply with this text, to both kinds of question."""
    return json.dumps({"choices": [{"text": text, "message": {"role": "assistant", "content": text}}]}).encode()
