"""A vision model behind an OpenAI-compatible server (vLLM and others): pictures in, prose out.

The server batches; here its requests run side by side. The key comes from the environment only.
"""

from __future__ import annotations

import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import tenacity
from PIL import Image

from captioning.observer_config import EndpointConfig
from captioning.observers.answers import AnswerError, cleaned, fault, refuse
from captioning.observers.weights import model_name

# A server that is busy or restarting answers again within this: 1 + 2 + 4 + 8 s of waiting.
ATTEMPTS, WAIT_S, WAIT_MOST_S = 5, 1.0, 30.0
BUSY_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
JPEG_QUALITY = 95  # what is lost stays below what any vision encoder sees
RETRY_PROMPT = "Say in two short, complete sentences what can be seen in this picture."


class BusyError(RuntimeError):
    """The server can't answer now; asking again may help."""


class Endpoint:
    """See `EndpointConfig`; `id` and `revision` name it in observations."""

    shrink = None

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        key = os.environ.get(config.key_variable)
        self._client = httpx2.Client(
            base_url=config.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.answer_timeout_s,
        )
        self.id = model_name(config.model)
        self.revision = f"endpoint-{config.prompt.digits()}"

    def observe(self, pictures: list[Image.Image]) -> list[str | Exception]:
        """A caption, or the error that it cost, for each RGB picture."""
        with ThreadPoolExecutor(len(pictures), "endpoint") as pool:
            return list(pool.map(self._caption, pictures))

    def _caption(self, picture: Image.Image) -> str | Exception:
        try:
            url = _data_url(picture, self._config.max_side_px)
            answer = self._checked(url, self._config.prompt.rendered())
            if isinstance(answer, AnswerError):
                prompt = self._config.prompt.model_copy(update={"text": RETRY_PROMPT})
                answer = self._checked(url, prompt.rendered())
            return answer
        except (httpx2.HTTPError, BusyError, AnswerError) as error:
            return error

    def _checked(self, url: str, prompt: str) -> str | AnswerError:
        said, ended = self._asked(url, prompt)
        text = cleaned(said)
        reason = fault(text, ended)
        return refuse(text, reason) if reason else text

    def _asked(self, url: str, prompt: str) -> tuple[str, bool]:
        """(text, whether the model ended it itself); asks again while the server is busy."""
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((BusyError, httpx2.TransportError)),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(WAIT_S, max=WAIT_MOST_S),
            reraise=True,
        )
        return attempts(self._asked_once, url, prompt)

    def _asked_once(self, url: str, prompt: str) -> tuple[str, bool]:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": prompt},
        ]
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.prompt.max_new_tokens,
            "temperature": 0,
        }
        response = self._client.post("chat/completions", json=body)
        if response.status_code in BUSY_STATUSES:
            raise BusyError(f"{self._config.url} answered {response.status_code}")
        response.raise_for_status()
        return _said(response)


def _said(response: Any) -> tuple[str, bool]:
    """What the first choice says; AnswerError when the answer has another shape."""
    try:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AnswerError("not the answer of an OpenAI-compatible server") from error
    return text or "", reason != "length"


def _data_url(picture: Image.Image, max_side_px: int) -> str:
    shrunk = picture.copy()
    shrunk.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
