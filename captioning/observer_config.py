"""Which models look at the pictures, and how each is served: one entry per model.

Read from the settings file; the entries are told apart by `type`. Never holds a secret: the key of
an endpoint is read from the environment variable that is named here.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from captioning.observations import Kind

PROMPT_DIGITS = 8  # of the prompt's hash in an observation's revision


class Serving(BaseModel):
    """How one model is served; the same for every type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(16, ge=1, le=1024, description="Pictures that the model sees at once.")
    min_replicas: int = Field(
        1, ge=0, le=1024, description="0: no process until the first picture comes."
    )
    max_replicas: int = Field(
        1, ge=1, le=1024, description="More than min_replicas: grows and shrinks with the queue."
    )
    gpus: float = Field(
        0, ge=0, le=64, description="Of each replica; 0.25 lets four share a GPU. 0: none reserved."
    )
    # Logical: Ray only counts them. Small, so that the default models fit a machine with two.
    cpus: float = Field(0.25, ge=0, le=1024, description="Of each replica; Ray only counts them.")
    timeout_s: float = Field(
        600, gt=0, description="Longest wait for an answer, the model's start included."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Serving:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is over {self.max_replicas}")
        return self


class Prompt(BaseModel):
    """What a captioner is asked; its hash is part of the observation's revision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(
        "Describe this picture in one or two plain sentences: who is shown, the pose, the clothes, "
        "the setting and the framing.",
        min_length=1,
        description="The question.",
    )
    do_not_mention: tuple[str, ...] = Field(
        (), description="What the caption must leave out, such as the look the trigger stands for."
    )
    max_new_tokens: int = Field(
        120, ge=8, le=4096, description="An answer cut off there is asked for again, shorter."
    )

    def rendered(self) -> str:
        """The question with what not to mention."""
        if not self.do_not_mention:
            return self.text
        return f"{self.text} Do not mention {', '.join(self.do_not_mention)}."

    def digits(self) -> str:
        """8 digits of its hash: another prompt is another observation."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:PROMPT_DIGITS]


class TaggerConfig(Serving):
    """A tagger of the WD convention: tags and scores."""

    type: Literal["tagger"] = "tagger"
    source: str = Field(description="Folder with model.onnx and selected_tags.csv.")


class CaptionerConfig(Serving):
    """An image-to-text model of transformers: prose."""

    type: Literal["captioner"] = "captioner"
    source: str = Field(description="Path or hub id.")
    prompt: Prompt | None = Field(
        None, description="For models that take one; none means the family's own default."
    )


class EndpointConfig(Serving):
    """A vision model behind an OpenAI-compatible server, such as vLLM's: prose."""

    type: Literal["endpoint"] = "endpoint"
    url: str = Field(
        pattern=r"^https?://[^\s@]+$", description="Such as http://gpu-box:8000/v1, without a key."
    )
    model: str = Field(min_length=1, description="The name under which the server has it.")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the key; may be unset."
    )
    prompt: Prompt = Prompt()
    max_side_px: int = Field(
        1024, ge=64, le=8192, description="Pictures are shrunk to this before they are sent."
    )
    answer_timeout_s: float = Field(120, gt=0, description="For one answer of the server.")


class EmbedderConfig(Serving):
    """A CLIP: embeddings."""

    type: Literal["embedder"] = "embedder"
    source: str = Field(description="Path or hub id.")


class QualityConfig(Serving):
    """Figures that pixels alone give, without a model."""

    type: Literal["quality"] = "quality"


class SubjectConfig(Serving):
    """One box around what stands out, without a model."""

    type: Literal["subject"] = "subject"


ObserverConfig = Annotated[
    TaggerConfig
    | CaptionerConfig
    | EndpointConfig
    | EmbedderConfig
    | QualityConfig
    | SubjectConfig,
    Field(discriminator="type"),
]
KINDS: dict[str, Kind] = {
    "tagger": "tags",
    "captioner": "prose",
    "endpoint": "prose",
    "embedder": "embedding",
    "quality": "quality",
    "subject": "boxes",
}


def kind_of(config: ObserverConfig) -> Kind:
    """What the observer's answers are."""
    return KINDS[config.type]
