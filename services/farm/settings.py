"""Where the farm keeps its state and which engine, registry and models it uses.

Read from `$LORAFARM_HOME/settings.yaml` when there is one; every field has a default, so an empty
home is a working farm. Never holds a secret: those stay in their own files or the environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from captioning import ObserverConfig, Store, load_config

HOME_VARIABLE = "LORAFARM_HOME"
SETTINGS_FILE = "settings.yaml"


class Settings(BaseModel):
    """The farm's settings; the file may name any of these fields and no other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ray_address: str = Field(
        "local",
        description="'local' starts Ray in place and stops it at the end; else a cluster's "
        "address, such as 'ray://head:10001' or '10.0.0.1:6379'.",
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow tracking URI; none means the embedded store `mlflow.db` in the home.",
    )
    base: str | None = Field(
        None,
        description="Base that sweeps train on when they name none, and that pictures are checked "
        "for: path or hub id, or a .safetensors checkpoint; none means the starter base.",
    )
    tagger: str | None = Field(
        None, description="Folder of a WD-style ONNX tagger; none means the starter tagger."
    )
    captioner: str | None = Field(
        None,
        description="Path or hub id of an image-to-text model; none means the starter captioner.",
    )
    embedder: str | None = Field(
        None, description="Path or hub id of the CLIP that scores; none means the starter CLIP."
    )
    observers: tuple[ObserverConfig, ...] | None = Field(
        None,
        min_length=1,
        description="The models that look at the pictures and how each is served, see "
        "docs/observing.md; none means the tagger, captioner and embedder above, and quality.",
    )
    dataset_store: str | None = Field(
        None,
        description="Where frozen versions are put at once and fetched from when there are none "
        "here: s3://bucket/prefix or a shared folder; none means the home alone.",
    )
    workers: int = Field(1, ge=1, le=1024, description="Ray Train workers in a worker group.")
    min_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Start with as few workers as this when no more find a place, at the beginning "
        "and after a death; the results are the same. None means wait for all.",
    )
    cpus_per_worker: int = Field(
        default_factory=lambda: max(1, os.cpu_count() or 1),
        ge=1,
        description="CPU cores of one worker, which runs as many threads. Default: all here.",
    )
    trials_per_pack: int = Field(
        8,
        ge=1,
        le=64,
        description="Trials that are trained together on one base in memory, at most; a pack that "
        "does not fit is trained in halves.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass instead of keeping them: up "
        "to a half slower, and room for larger batches and packs. The results are the same.",
    )
    compile: bool = Field(
        False,
        description="Compile the base's blocks with torch.compile: faster steps after a first one "
        "that takes minutes. The results are the same up to float rounding. Needs a C++ compiler.",
    )
    optimizer_states: Literal["best_and_last", "all"] = Field(
        "best_and_last",
        description="Which checkpoints keep the optimiser's state, most of their size: the best "
        "and the last of each trial, or all. Adapters, scores and pictures are always kept.",
    )
    use_gpu: bool | None = Field(
        None, description="Train on GPUs; none means yes where CUDA is available."
    )
    gpus_per_worker: float = Field(
        1.0,
        gt=0,
        le=1,
        description="What a worker books of a GPU in Ray's accounts, so that other farms on the "
        "same cluster find a place beside it. It does not limit the memory that is used.",
    )
    strategy: Literal["ddp", "fsdp", "deepspeed"] = Field(
        "ddp",
        description="ddp: every worker holds the whole frozen base. fsdp, deepspeed: every worker "
        "holds its share of it, for a base that does not fit one GPU; by PyTorch's FSDP2, or by "
        "DeepSpeed's ZeRO-3 where that is installed. The results are the same.",
    )
    offload_base: bool = Field(
        False,
        description="With fsdp or deepspeed on GPUs: keep the shares in the host's memory, and on "
        "the GPU only the block that computes. Much slower.",
    )
    share_optimizers: bool = Field(
        False,
        description="With several workers: each keeps the optimiser states of its part of a pack's "
        "trials (the first stage of ZeRO), which makes room for larger ranks and packs. The "
        "results are the same.",
    )

    @model_validator(mode="after")
    def _each_model_named_once(self) -> Settings:
        for name in ("tagger", "captioner"):
            if self.observers is not None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` and `observers` are both set: name it in `observers`")
        return self

    @model_validator(mode="after")
    def _workers_fit_together(self) -> Settings:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"`min_workers` is {self.min_workers}, and `workers` {self.workers}")
        if self.gpus_per_worker < 1 and self.workers > 1:
            # NCCL: "Duplicate GPU detected".
            raise ValueError(
                "`gpus_per_worker` below 1 needs `workers: 1`: workers of one group cannot "
                "exchange gradients on the same GPU"
            )
        if self.compile and self.strategy != "ddp":
            raise ValueError(
                "`compile` needs `strategy: ddp`: a compiled block cannot gather its weights"
            )
        if self.share_optimizers and self.workers == 1:
            raise ValueError("`share_optimizers` needs `workers` of 2 or more to share among")
        if self.offload_base and self.strategy == "ddp":
            raise ValueError("`offload_base` needs `strategy: fsdp` or `deepspeed`")
        return self


@dataclass(frozen=True)
class Home:
    """A farm's folder: its store of bytes, its settings, its registry."""

    path: Path
    settings: Settings

    @property
    def store(self) -> Store:
        return Store(self.path)

    @property
    def tracking_uri(self) -> str:
        return self.settings.tracking_uri or f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Where MLflow's files go beside a database; a tracking server has its own place."""
        return self.path / "mlartifacts"


def open_home(path: Path | None = None) -> Home:
    """Open the farm at `path`, else at `$LORAFARM_HOME`, else at `~/.lorafarm`.

    Nothing is created here: the folder appears with the first thing that is stored in it.
    Raises UserError when `settings.yaml` holds an unknown key or a bad value.
    """
    chosen = path or Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".lorafarm")
    chosen = chosen.expanduser().resolve()
    file = chosen / SETTINGS_FILE
    settings = load_config(Settings, file) if file.exists() else Settings()
    return Home(chosen, settings)
