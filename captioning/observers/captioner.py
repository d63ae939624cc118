"""Image-to-text models of transformers: pictures in, a checked caption each out.

What the families (BLIP, Florence-2, LLaVA, ...) do differently is in `families/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from captioning.errors import UserError
from captioning.observer_config import Prompt
from captioning.observers.answers import AnswerError, cleaned, fault, refuse
from captioning.observers.families import family_of
from captioning.observers.weights import (
    loading,
    model_name,
    require_all_weights,
    revision_of,
)

# Beam search with 3 beams is BLIP's and Florence-2's own setting for captioning; no sampling, so
# the same picture always gets the same caption. Chat models answer greedily: beams cost them 3 x.
BEAMS = 3
MAX_NEW_TOKENS = 75  # BLIP's long captions stay below; SD's text encoder reads 75 tokens


class Captioner:
    """A captioner loaded from a folder or a hub id, safetensors only."""

    shrink = None  # the families differ in what they do first

    def __init__(
        self,
        path_or_id: Path | str,
        threads: int = 1,
        beams: int | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        """Raises UserError when there is no such model; `threads` counts on the CPU only."""
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        torch.set_num_threads(threads)
        source = str(path_or_id)
        cuda = torch.cuda.is_available()
        with loading(source, "image-to-text model", "AutoModelForImageTextToText"):
            config = AutoConfig.from_pretrained(source)
            self._family: Any = family_of(source, config.model_type)
            self._processor: Any = self._family.load_processor(source)
            model, info = AutoModelForImageTextToText.from_pretrained(
                source,
                use_safetensors=True,
                dtype=torch.bfloat16 if cuda and self._family.FREE_PROMPT else torch.float32,
                output_loading_info=True,
            )
            require_all_weights(info)
        if prompt is not None and prompt.do_not_mention and not self._family.FREE_PROMPT:
            raise UserError(
                source,
                f"a {config.model_type} model can't be told what not to mention",
                "leave do_not_mention out, or name a chat model",
            )
        self._beams = beams or (1 if self._family.FREE_PROMPT else BEAMS)
        self._device = "cuda" if cuda else "cpu"
        self._model: Any = model.eval().to(self._device)
        self._prompt = prompt.rendered() if prompt else self._family.DEFAULT_PROMPT
        self._avoid = _avoid(prompt)
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._new_tokens = prompt.max_new_tokens if prompt else MAX_NEW_TOKENS
        self._ends = _end_tokens(model, self._processor)
        self.id = model_name(source)
        revision = revision_of(source, model.config)
        self.revision = f"{revision}-{prompt.digits()}" if prompt else revision

    def observe(self, pictures: list[Image.Image]) -> list[str | AnswerError]:
        """A caption, or why its answer is none, for each RGB picture.

        An answer with a fault is asked for once more, with another prompt.
        """
        answers = self._checked(pictures, self._prompt)
        wrong = [row for row, answer in enumerate(answers) if isinstance(answer, AnswerError)]
        if wrong:
            retry = self._family.RETRY_PROMPT + self._avoid
            again = self._checked([pictures[row] for row in wrong], retry)
            for row, answer in zip(wrong, again, strict=True):
                answers[row] = answer
        return answers

    def _checked(self, pictures: list[Image.Image], prompt: str) -> list[str | AnswerError]:
        answers: list[str | AnswerError] = []
        for said, ended in self.generate(pictures, prompt):
            text = cleaned(said)
            reason = fault(text, ended)
            answers.append(refuse(text, reason) if reason else text)
        return answers

    def generate(self, pictures: list[Image.Image], prompt: str) -> list[tuple[str, bool]]:
        """(text, whether the model ended it itself) for each picture."""
        import torch

        inputs = self._family.inputs(self._processor, pictures, prompt)
        inputs = inputs.to(self._device, self._model.dtype)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                num_beams=self._beams,
                do_sample=False,
                max_new_tokens=self._room_after(inputs),
                max_length=None,
            )
        tokens = self._family.new_tokens(tokens, inputs)  # (N, L)
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        ended = [self._ended(row, self._room_after(inputs)) for row in tokens.tolist()]
        return list(zip(texts, ended, strict=True))

    def _ended(self, row: list[int], room: int) -> bool:
        """Whether the model ended it itself; a shorter answer than its batch's is filled up."""
        first = next((at for at, token in enumerate(row) if token in self._ends), None)
        if first is None:
            return False
        # Florence-2's generation sets an end at the last place whatever stands before it.
        forced = self._model.generation_config.forced_eos_token_id is not None
        return not (forced and first == room - 1)

    def _room_after(self, inputs: Any) -> int:
        """New tokens: as many as are wanted, or as the model has positions for."""
        if self._positions is None:
            return self._new_tokens
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return max(1, min(self._new_tokens, self._positions - 1 - prompt))


def _avoid(prompt: Prompt | None) -> str:
    """What not to mention, for the retry prompt too."""
    if prompt is None or not prompt.do_not_mention:
        return ""
    return f" Do not mention {', '.join(prompt.do_not_mention)}."


def _end_tokens(model: Any, processor: Any) -> set[int]:
    """The tokens that a finished row may end with."""
    text = model.config.get_text_config()
    named = [
        model.generation_config.eos_token_id,
        getattr(text, "eos_token_id", None),
        getattr(text, "sep_token_id", None),  # BLIP's decoder ends with it
        getattr(processor, "tokenizer", processor).pad_token_id,
    ]
    return {
        token
        for found in named
        if found is not None
        for token in (found if isinstance(found, list | tuple) else [found])
    }
