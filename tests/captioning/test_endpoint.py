"""Captions from an OpenAI-compatible server: a small real one, over HTTP on the loopback."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import tenacity
from PIL import Image as Pillow

from captioning import EndpointConfig, Prompt
from captioning.observers import endpoint
from captioning.observers.answers import AnswerError
from captioning.observers.endpoint import Endpoint
from captioning.observers.load import identify

RED = Pillow.new("RGB", (600, 300), "red")
SAID = "A red field fills the picture."


class Server:
    """Answers from a list of (status, text, finish reason), then the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str | None, str]] = [(200, SAID, "stop")]
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(({**self.headers, "path": self.path}, body))
                rest = len(outer.answers) > 1
                status, text, reason = outer.answers.pop(0) if rest else outer.answers[0]
                choice = {"message": {"content": text}, "finish_reason": reason}
                data = json.dumps({"choices": [choice]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "WAIT_S", 0.001)
    running = Server()
    thread = Thread(target=running.http.serve_forever, daemon=True)
    thread.start()
    yield running
    running.http.shutdown()
    running.http.server_close()
    thread.join()


def observer(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(EndpointConfig(url=server.url, model="Qwen/Qwen2.5-VL-7B", **changes))


def question(request: tuple[dict[str, str], dict[str, Any]]) -> str:
    return request[1]["messages"][0]["content"][1]["text"]


def test_a_picture_is_sent_shrunk_with_the_prompt_and_the_key(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "secret")
    prompt = Prompt(text="What is it?", do_not_mention=("hair", "eyes"), max_new_tokens=50)
    seen = observer(server, key_variable="MY_KEY", prompt=prompt, max_side_px=128)
    assert seen.observe([RED]) == [SAID]
    headers, body = server.requests[0]
    assert headers["path"] == "/v1/chat/completions"
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == (
        "Bearer secret"
    )
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("Qwen/Qwen2.5-VL-7B", 50, 0)
    assert question(server.requests[0]) == "What is it? Do not mention hair, eyes."
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    sent = Pillow.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert sent.size == (128, 64)


def test_without_a_key_none_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert observer(server).observe([RED]) == [SAID]
    assert "authorization" not in {name.lower() for name in server.requests[0][0]}


def test_a_busy_server_is_asked_again_and_a_broken_one_costs_an_error(server: Server):
    server.answers = [(503, None, "stop"), (429, None, "stop"), (200, SAID, "stop")]
    assert observer(server).observe([RED]) == [SAID]
    assert len(server.requests) == 3
    server.answers = [(500, None, "stop")]
    (error,) = observer(server).observe([RED])
    assert isinstance(error, endpoint.BusyError) and "500" in str(error)
    assert len(server.requests) == 3 + endpoint.ATTEMPTS


def test_a_refused_key_is_told_at_once(server: Server):
    server.answers = [(401, None, "stop")]
    (error,) = observer(server).observe([RED])
    assert "401" in str(error) and len(server.requests) == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [("I'm sorry, I can't help with that.", "stop"), (None, "stop"), ("A woman in a", "length")],
)
def test_what_is_no_caption_is_asked_for_once_more_and_never_kept(
    server: Server, said: str | None, reason: str
):
    server.answers = [(200, said, reason), (200, SAID, "stop")]
    assert observer(server).observe([RED]) == [SAID]
    assert question(server.requests[1]) == endpoint.RETRY_PROMPT
    server.answers = [(200, said, reason)]
    (error,) = observer(server).observe([RED])
    assert isinstance(error, AnswerError)
    assert len(server.requests) == 4


def test_one_picture_that_fails_costs_no_other(server: Server):
    server.answers = [(401, None, "stop"), (200, SAID, "stop")]
    answers = observer(server).observe([RED] * 4)
    assert sorted(isinstance(answer, Exception) for answer in answers) == [False] * 3 + [True]


def test_a_server_that_is_not_there_costs_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "WAIT_S", 0.001)
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m")
    (error,) = Endpoint(config).observe([RED])
    assert isinstance(error, Exception) and not isinstance(error, tenacity.RetryError)


def test_another_prompt_is_another_revision():
    config = EndpointConfig(url="http://gpu:8000/v1", model="Qwen/Qwen2.5-VL-7B")
    other = config.model_copy(update={"prompt": Prompt(do_not_mention=("hair",))})
    name, revision = identify(config)
    assert name == "Qwen--Qwen2.5-VL-7B"
    assert (name, revision) == (Endpoint(config).id, Endpoint(config).revision)
    assert identify(other) == (name, Endpoint(other).revision) != (name, revision)


def test_a_key_has_no_place_in_the_address():
    with pytest.raises(ValueError, match="url"):
        EndpointConfig(url="https://user:key@host/v1", model="m")
