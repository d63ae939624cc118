"""Every family by the same tests: encode, sample, train, resume, export, reload.

The reference is diffusers' own pipeline and PEFT, on small random models of the real architectures.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image as Picture
from safetensors import safe_open
from tiny_families import BUILDERS, build
from transformers.processing_utils import ProcessorMixin

from captioning import DatasetVersion, UserError
from training import check_on_base
from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.batches import bucket_of_step, draw_batch
from training.data.buckets import BucketLimits
from training.data.latents import LatentCache, encode_dataset
from training.export import export_adapter
from training.families import (
    FAMILIES,
    Base,
    base_facts,
    load_base,
    native_size_px,
    size_multiple_px,
)
from training.fitting import fit_recipe
from training.loop import Callbacks, train, train_pack
from training.objective import FLOW_TIMESTEPS, FlowMatching, FlowShift
from training.pack.adapters import load_adapter, target_layers
from training.pack.slot import Trial
from training.recipe import Network, Recipe
from training.scoring.sampling import initial_noise, sample

# What all tests are run on, and variants of these that differ in what is said beside each.
NAMES = [
    "sd15",
    "sd15-sd2",
    "sdxl",
    "sd3",
    "flux-dev",
    "flux2-klein",
    "flux2-dev",
    "zimage",
    "qwen_image",
]
OTHER_OBJECTIVE = ["sdxl-v"]
OTHER_TEXT = ["sd3-no-t5"]
OTHER_GUIDANCE = ["flux-schnell", "flux2-distilled"]
FLOWS = [name for name in NAMES if FAMILIES[name.split("-")[0]].is_flow]
SIZE_PX = 64
PROMPTS = ["zkw, person, red hat", "zkw, close-up"]

OfName = Callable[[str], Any]


class TextProcessor(ProcessorMixin):
    """FLUX.2 [dev]'s PixtralProcessor without its eyes, which need torchvision.

    It inherits the same `apply_chat_template`.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> OfName:
    """The small pipelines on disk; read them, never change them."""
    return functools.cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def load_once(build_once: OfName) -> OfName:
    """Loading takes longer than most tests: each base once."""
    return functools.cache(lambda name: load_base(build_once(name)))


@pytest.fixture(scope="session")
def load_pipeline_once(load_once: OfName) -> OfName:
    """diffusers' own pipeline of each base, once."""

    def load(name: str) -> Any:
        base = load_once(name)
        absent = {part: None for part in base.optional if not (base.folder / part).is_dir()}
        index = json.loads((base.folder / "model_index.json").read_text())
        kind = getattr(diffusers, index["_class_name"])
        pipeline = kind.from_pretrained(base.folder, use_safetensors=True, **absent)
        if name == "flux2-dev":
            pipeline.tokenizer = TextProcessor(pipeline.tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return functools.cache(load)


@pytest.fixture(scope="session")
def encode_once(
    load_once: OfName, tiny_dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> OfName:
    folder = tmp_path_factory.mktemp("latents")
    return functools.cache(
        lambda name: encode_dataset(tiny_dataset, load_once(name), SIZE_PX, False, folder / name)
    )


@pytest.fixture(scope="session")
def wide_dataset(
    tiny_dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> DatasetVersion:
    """The pictures of `tiny_dataset`, the second and third of them 120 × 70 px."""
    folder = tmp_path_factory.mktemp("wide")
    samples = list(tiny_dataset.train[:4])
    for number in (1, 2):
        with Picture.open(samples[number].path) as picture:
            picture.resize((120, 70)).save(folder / f"{number}.png")
        samples[number] = replace(
            samples[number], path=folder / f"{number}.png", sha256=f"{number:064}"
        )
    return replace(tiny_dataset, train=tuple(samples))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(name: str, load_once: OfName) -> Base:
    """The base with a denoiser of its own, as if loaded afresh."""
    base: Base = copy.copy(load_once(name))
    base.denoiser = copy.deepcopy(base.denoiser)
    return base


@pytest.fixture
def pipeline(name: str, base: Base, load_pipeline_once: OfName) -> Any:
    """diffusers' own pipeline of the base, with a denoiser of its own."""
    pipeline = copy.copy(load_pipeline_once(name))
    denoiser = copy.deepcopy(getattr(pipeline, base.denoiser_name))
    setattr(pipeline, base.denoiser_name, denoiser)
    return pipeline


@pytest.fixture
def cache(name: str, encode_once: OfName) -> LatentCache:
    return cast(LatentCache, encode_once(name))


def small(base: Base, **changes: Any) -> Recipe:
    options = {"steps": 3, "checkpoint_every": 2, "batch_size": 2, "caption_dropout": 0.3}
    network = changes.pop("network", {"rank": 4})
    # Adam divides by the size of a gradient; eps keeps rounding in the smallest ones small.
    optimizer = {"lr": 1e-2, "eps": 1e-4}
    recipe = Recipe.model_validate(
        {**options, **changes, "network": network, "optimizer": optimizer}
    )
    return fit_recipe(recipe, base.family, "test")


@pytest.mark.parametrize("name", BUILDERS, indirect=True)
def test_it_is_known_by_its_index(name: str, base: Base) -> None:
    facts = base_facts(base.folder)
    assert facts.family == base.family == name.split("-")[0]
    assert facts.content_hash == base.content_hash
    fixed = base.family in {"flux", "flux2", "zimage", "qwen_image"}  # their configs name no size
    assert native_size_px(base.folder) == (1024 if fixed else SIZE_PX)
    frozen = (base.denoiser, base.vae, *base.text_encoders.values())
    assert not any(p.requires_grad for module in frozen for p in module.parameters())


@pytest.mark.parametrize("name", BUILDERS, indirect=True)
def test_without_weights_it_has_the_same_layers_and_sizes(
    name: str,
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    hollow = load_base(base.folder, "meta")
    assert not caplog.messages
    assert hollow.denoiser.device.type == "meta"
    pattern = r"regex:^(?!cap_embedder)"
    for targets in ("attention", "attention+ff", pattern):
        layers, wanted = (target_layers(one, Network(targets=targets)) for one in (hollow, base))
        assert list(layers) == list(wanted)
        for key, layer in wanted.items():
            assert layers[key].weight.shape == layer.weight.shape, key
    for fact in ("vae_factor", "latent_channels", "guidance_embedded"):
        assert getattr(hollow, fact) == getattr(base, fact), fact
    assert size_multiple_px(base.folder) == base.vae_factor * base.patch


def test_fp16_is_refused_where_it_overflows(base: Base) -> None:
    recipe = small(base, precision="fp16")
    if base.family in {"sd15", "sdxl", "sd3"}:
        check_on_base([recipe], base.folder)
        return
    with pytest.raises(UserError, match=rf"(?s)precision.*fp16.*{base.family} surpass.*bf16"):
        check_on_base([recipe], base.folder)


@pytest.mark.parametrize("name", NAMES + OTHER_TEXT, indirect=True)
def test_prompts_are_encoded_as_by_the_pipeline(base: Base, pipeline: Any) -> None:
    found = base.encode_prompts(PROMPTS)
    wanted = dict(zip(found, encoded_by(pipeline, base), strict=True))
    for part, tensor in wanted.items():
        torch.testing.assert_close(found[part], tensor, rtol=1e-4, atol=1e-4)
    shapes = {part: tuple(tensor.shape[1:]) for part, tensor in found.items()}
    own = base.picture_conditions((64, 64), (0, 0), (64, 64))
    assert {**shapes, **{k: tuple(t.shape) for k, t in own.items()}} == base.condition_shapes()


@pytest.mark.parametrize("name", NAMES + OTHER_TEXT, indirect=True)
def test_the_text_s_precision_is_known_before_an_encoder_is_loaded(
    name: str, load_once: OfName
) -> None:
    """CLIPs are fp32 everywhere; larger encoders bf16 off the CPU, for which a bare device does."""
    on_cpu: Base = load_once(name)
    elsewhere = copy.copy(on_cpu)
    elsewhere.__dict__.pop("text_encoders", None)
    elsewhere.device = torch.device("meta")
    only_clip = on_cpu.family in {"sd15", "sdxl"} or name == "sd3-no-t5"
    for base, larger in ((on_cpu, torch.float32), (elsewhere, torch.bfloat16)):
        said = base.text_dtype
        assert said == (torch.float32 if only_clip else larger)
        held = {encoder.dtype for encoder in base.text_encoders.values()}
        assert said in held and held <= {torch.float32, said}


def encoded_by(pipeline: Any, base: Base) -> tuple[torch.Tensor, ...]:
    """What the pipeline makes of PROMPTS, in the order of the base's conditions."""
    if base.family == "zimage":
        rows, _ = pipeline.encode_prompt(list(PROMPTS), device="cpu")
        masks = [torch.ones(len(row)) for row in rows]
        length = base.condition_shapes()["mask"][0]
        return padded(rows, length), padded(masks, length)
    if base.family == "flux2":
        return (pipeline.encode_prompt(PROMPTS, device="cpu")[0].detach(),)
    if base.family == "qwen_image":
        text, mask = pipeline.encode_prompt(PROMPTS, device="cpu")
        length = base.condition_shapes()["mask"][0]
        return padded(list(text), length), padded(list(mask.float()), length)
    if base.family == "sd15":
        return (pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0],)
    arguments = [PROMPTS] * (3 if base.family == "sd3" else 2)
    said = pipeline.encode_prompt(*arguments, device="cpu")
    return (said[0], said[1]) if base.family == "flux" else (said[0], said[2])


def padded(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    """Rows of several lengths as one tensor with zeros behind them.  # (N, length, ...)"""
    rows = [torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])]) for row in rows]
    return torch.stack(rows).detach()


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *((name, 1.0) for name in NAMES),
        *((name, 3.0) for name in NAMES + OTHER_OBJECTIVE + OTHER_GUIDANCE),
    ],
    indirect=["name"],
)
def test_pictures_are_those_of_the_pipeline(base: Base, pipeline: Any, guidance: float) -> None:
    noise = initial_noise(base, [3, 1], SIZE_PX)
    options: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": ["", ""]}
    if base.family == "sdxl":
        config = pipeline.scheduler.config
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            config, clip_sample=False, set_alpha_to_one=True
        )
        noise = noise.clone()
    if base.family == "flux2":
        del options["negative_prompt"]  # klein's is always the empty one, dev has none
    if base.family == "zimage":
        options["guidance_scale"] = guidance - 1  # its pipeline counts from 0
    if base.family == "qwen_image":
        noise = pipeline._pack_latents(noise, 2, 16, 8, 8)
        options["true_cfg_scale"] = options.pop("guidance_scale")
    if base.family == "flux":
        noise = pipeline._pack_latents(noise, 2, 16, 8, 8)
        if not base.guidance_embedded:
            options = {"true_cfg_scale": guidance, "negative_prompt": ["", ""]}
        else:
            options = {"guidance_scale": guidance}
    wanted = pipeline(
        prompt=list(PROMPTS),  # Z-Image's pipeline writes into it
        num_inference_steps=3,
        height=SIZE_PX,
        width=SIZE_PX,
        latents=noise,
        output_type="np",
        **options,
    ).images
    found = sample(base, PROMPTS, [3, 1], steps=3, guidance=guidance, size_px=SIZE_PX)
    # The tiny VAE is random, so a rounding of the last bit may show as one level.
    assert np.abs(found.astype(int) - (wanted * 255).round()).max() <= 1


@pytest.mark.parametrize("name", ["flux2-klein", "qwen_image"], indirect=True)
def test_pixels_become_the_latents_of_the_pipeline(base: Base, pipeline: Any) -> None:
    """VAEs that are asked in their own way; the other families' are test_families.py's."""
    pixels = torch.rand(2, 3, SIZE_PX, SIZE_PX) * 2 - 1
    with torch.no_grad():
        if base.family == "flux2":
            wanted = pipeline._encode_vae_image(pixels, generator=None)
        else:  # the text-to-image pipeline has no such method
            parts = SimpleNamespace(vae=pipeline.vae, latent_channels=pipeline.vae.config.z_dim)
            encode = diffusers.QwenImageEditPipeline._encode_vae_image
            wanted = encode(parts, pixels.unsqueeze(2), generator=None).squeeze(2)
    found = base.to_latents(base.encode_pixels(pixels)[0])
    torch.testing.assert_close(found, wanted)
    assert found.shape[1:] == (base.latent_channels, *[SIZE_PX // base.vae_factor] * 2)


def forward(base: Base, denoiser: Any, noisy: Any, batch: Any) -> torch.Tensor:
    """The denoiser's output as diffusers' training script of the family asks for it."""
    told, times = batch.conditions, batch.timesteps
    if base.family == "sd15":
        return denoiser(noisy, times, told["text"]).sample
    if base.family == "sdxl":
        added = {"text_embeds": told["pooled"], "time_ids": told["time_ids"]}
        return denoiser(noisy, times, told["text"], added_cond_kwargs=added).sample
    if base.family == "sd3":
        return denoiser(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=told["text"],
            pooled_projections=told["pooled"],
            return_dict=False,
        )[0]
    if base.family == "zimage":
        captions = [
            text[: int(mask.sum())] for text, mask in zip(told["text"], told["mask"], strict=True)
        ]
        pictures = list(noisy.unsqueeze(2).unbind())
        outputs = denoiser(pictures, (1000 - times) / 1000, captions, return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)
    if base.family == "flux2":
        klein = diffusers.Flux2KleinPipeline
        places = klein._prepare_latent_ids(noisy)
        output = denoiser(
            hidden_states=klein._pack_latents(noisy),
            timestep=times / 1000,
            guidance=torch.ones(len(noisy)) if denoiser.config.guidance_embeds else None,
            encoder_hidden_states=told["text"],
            txt_ids=klein._prepare_text_ids(told["text"]),
            img_ids=places,
            return_dict=False,
        )[0]
        return klein._unpack_latents_with_ids(output, places)
    count, channels, height, width = noisy.shape
    if base.family == "qwen_image":
        qwen = diffusers.QwenImagePipeline
        output = denoiser(
            hidden_states=qwen._pack_latents(noisy, count, channels, height, width),
            timestep=times / 1000,
            encoder_hidden_states=told["text"],
            encoder_hidden_states_mask=told["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return qwen._unpack_latents(output, height * 8, width * 8, 8).squeeze(2)
    pipeline = diffusers.FluxPipeline
    output = denoiser(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        timestep=times / 1000,
        guidance=torch.ones(count) if denoiser.config.guidance_embeds else None,
        pooled_projections=told["pooled"],
        encoder_hidden_states=told["text"],
        txt_ids=torch.zeros(told["text"].shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, "cpu", torch.float32
        ),
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(output, height * 8, width * 8, 8)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "lora") for name in [*NAMES, *OTHER_OBJECTIVE, "flux-schnell"]),
        *((name, "dora") for name in NAMES),
    ],
    indirect=["name"],
)
def test_training_equals_a_plain_diffusers_and_peft_loop(
    base: Base, pipeline: Any, cache: LatentCache, method: str, tmp_path: Path
) -> None:
    network = {"rank": 4, "method": method, "dora_axis": "output"}
    recipe = small(base, network=network, min_snr_gamma=None, seed=5)
    assert_equal_to_a_plain_loop(base, pipeline, cache, recipe, tmp_path)


@pytest.mark.parametrize("name", ["sdxl", "flux-dev", "sd3", "zimage"], indirect=True)
def test_training_with_buckets_equals_a_plain_diffusers_and_peft_loop(
    base: Base, pipeline: Any, wide_dataset: DatasetVersion, tmp_path: Path
) -> None:
    recipe = small(base, aspect_buckets=True, bucket_step_px=16, min_snr_gamma=None, seed=5)
    limits = BucketLimits.of(recipe)
    cache = encode_dataset(wide_dataset, base, SIZE_PX, False, tmp_path / "latents", limits=limits)
    cells = [tuple(bucket.mean.shape[-2:]) for bucket in cache.buckets]
    factor = base.vae_factor
    assert cells == [(48 // factor, 80 // factor), (SIZE_PX // factor,) * 2]
    asked = {bucket_of_step(cache.counts, step)[0] for step in range(recipe.steps)}
    assert asked == {0, 1}
    assert_equal_to_a_plain_loop(base, pipeline, cache, recipe, tmp_path)
    if base.family == "sdxl":  # the sizes as diffusers' pipeline tells them: file, corner, crop
        told = cache.conditions(1)["time_ids"]
        ids = pipeline._get_add_time_ids((70, 120), (0, 1), (48, 80), torch.float32, 32)
        assert torch.equal(told, ids[0])


def assert_equal_to_a_plain_loop(
    base: Base, pipeline: Any, cache: LatentCache, recipe: Recipe, folder: Path
) -> None:
    """Our training of `recipe` against one of diffusers, PEFT and torch; the draws are shared."""
    train(base, cache, recipe, folder / "trial")
    found = load_checkpoint(list_checkpoints(folder / "trial")[-1].path).adapter

    denoiser = getattr(pipeline, base.denoiser_name)
    denoiser.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    modules = "|".join(re.escape(name) for name in target_layers(base, recipe.network))
    use_dora = recipe.network.method == "dora"
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules, use_dora=use_dora))
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, weight_decay=0.01)
    for step in range(recipe.steps):
        batch = draw_batch(recipe, cache, step, range(2), 2, base.objective)
        latents = base.to_latents(batch.posterior_samples)
        if base.objective.prediction_type == "flow":
            sigmas = (batch.timesteps / FLOW_TIMESTEPS).view(-1, 1, 1, 1)
            noisy = (1 - sigmas) * latents + sigmas * batch.noise
            target = batch.noise - latents
        else:
            scheduler = diffusers.DDPMScheduler.from_pretrained(base.folder, subfolder="scheduler")
            noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
            target = batch.noise
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, batch.noise, batch.timesteps)
        loss = (forward(base, denoiser, noisy, batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in parameters:
            if parameter.grad is None:  # of a layer that reaches no output; a pack's is zero
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    wanted = {
        key.replace(".default", ""): tensor
        for key, tensor in denoiser.named_parameters()
        if "lora_" in key
    }
    assert len(wanted) == len(found)
    for key, tensor in wanted.items():
        own = found[f"{base.denoiser_name}.{key.removesuffix('.weight')}" + _weight(key)]
        tensor = tensor.detach()
        # Either is as far as 1.3e-5 from this loop in fp64.
        assert (own - tensor).abs().max() <= 2e-5 * tensor.abs().max(), key


def _weight(key: str) -> str:
    return "" if "magnitude" in key else ".weight"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_train_resume_sample_export_reload(
    base: Base, cache: LatentCache, method: str, tmp_path: Path
) -> None:
    recipe = small(base, network={"rank": 4, "method": method})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(base, cache, recipe, whole)
    asked = iter([False, True])
    assert train(base, cache, recipe, broken, stop=lambda: next(asked)) == 2
    train(base, cache, recipe, broken)
    checkpoints = list_checkpoints(whole)
    assert [one.step for one in checkpoints] == [2, 3]
    state = load_checkpoint(checkpoints[-1].path).adapter
    again = load_checkpoint(list_checkpoints(broken)[-1].path).adapter
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)

    plain = sample(base, PROMPTS, [1, 2], steps=2, guidance=1.0, size_px=SIZE_PX)
    load_adapter(base, state, recipe.network)
    trained = sample(base, PROMPTS, [1, 2], steps=2, guidance=1.0, size_px=SIZE_PX)
    assert np.abs(trained.astype(int) - plain.astype(int)).max() > 0
    for form in ("kohya", "diffusers"):
        report = export_adapter(
            checkpoints[-1].path,
            base,
            tmp_path / f"{form}.safetensors",
            form,  # type: ignore[arg-type]
            dtype=torch.float32,
        )
        assert report.modules == len(target_layers(base, recipe.network))
        assert report.max_error <= 0.01 * report.effect


@pytest.mark.parametrize(
    ("name", "version", "is_v2", "architecture"),
    [
        ("sd15", "sd_v1", "False", "stable-diffusion-v1"),
        ("sd15-sd2", "sd_v2_v", "True", "stable-diffusion-v2-768-v"),
    ],
    indirect=["name"],
)
def test_an_export_says_which_stable_diffusion_it_is_for(
    base: Base, cache: LatentCache, version: str, is_v2: str, architecture: str, tmp_path: Path
) -> None:
    """The words of kohya's sd-scripts, by which A1111 and Forge refuse what does not fit."""
    train(base, cache, small(base, steps=1), tmp_path / "trial")
    last = list_checkpoints(tmp_path / "trial")[-1].path
    export_adapter(last, base, tmp_path / "out.safetensors", "kohya")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == (version, is_v2)
    assert header["modelspec.architecture"] == f"{architecture}/lora"


def test_the_diffusers_export_gives_the_pipeline_the_same_pictures(
    base: Base, pipeline: Any, cache: LatentCache, tmp_path: Path
) -> None:
    recipe = small(base)
    train(base, cache, recipe, tmp_path / "trial")
    last = list_checkpoints(tmp_path / "trial")[-1].path
    export_adapter(last, base, tmp_path / "out.safetensors", "diffusers", dtype=torch.float32)
    pipeline.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    batch = draw_batch(recipe, cache, 0, range(2), 2, base.objective)
    noisy = base.to_latents(batch.posterior_samples)
    load_adapter(base, load_checkpoint(last).adapter, recipe.network)
    with torch.no_grad():
        wanted = base.predict(noisy, batch.timesteps, batch.conditions)
        found = forward(base, getattr(pipeline, base.denoiser_name), noisy, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FLOWS, indirect=True)
def test_a_flow_refuses_what_belongs_to_diffusions(base: Base) -> None:
    with pytest.raises(UserError, match=r"min_snr_gamma.*no signal-to-noise"):
        fit_recipe(Recipe(min_snr_gamma=5.0), base.family, "sweep.yaml")
    assert fit_recipe(Recipe(), base.family, "test").min_snr_gamma is None


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_diffusion_refuses_what_belongs_to_flows(family: str) -> None:
    with pytest.raises(UserError, match=r"sweep.yaml: timestep_shift.*flow models"):
        fit_recipe(Recipe(timestep_shift=3.0), family, "sweep.yaml")
    assert fit_recipe(Recipe(), family, "test") == Recipe()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_text_encoders_are_trained_where_they_are_clip_s_alone(family: str) -> None:
    asked = Recipe.model_validate({"network": {"text_encoder": {"lr": 1e-5}}})
    if family in {"sd15", "sdxl"}:
        assert fit_recipe(asked, family, "sweep.yaml") == asked
        return
    with pytest.raises(UserError, match=r"sweep.yaml: network.text_encoder.*sd15 and sdxl"):
        fit_recipe(asked, family, "sweep.yaml")


def test_family_defaults_fill_in_only_what_is_not_said() -> None:
    filled = fit_recipe(Recipe(), "flux", "test")
    assert filled.optimizer.lr == FAMILIES["flux"].defaults["optimizer.lr"] == 4e-4
    said = Recipe.model_validate({"optimizer": {"lr": 1e-5}, "batch_size": 3})
    assert fit_recipe(said, "flux", "test").optimizer.lr == 1e-5
    assert fit_recipe(said, "flux", "test").batch_size == 3


def test_targets_by_regular_expression(base: Base) -> None:
    queries = target_layers(base, Network(targets=r"regex:to_q$"))
    assert queries and all(name.endswith("to_q") for name in queries)
    with pytest.raises(UserError, match="names no linear layer"):
        target_layers(base, Network(targets="regex:nothing_like_it"))
    wide = target_layers(base, Network(targets="attention+ff"))
    assert target_layers(base, Network()).keys() < wide.keys()


@pytest.mark.parametrize("name", ["zimage", "qwen_image"], indirect=True)
def test_captions_of_several_lengths_share_a_pack(
    base: Base, cache: LatentCache, tmp_path: Path
) -> None:
    """Each trial learns what it learns alone, although the padding of a batch is everybody's."""
    recipes = [small(base, seed=1), small(base, seed=2, network={"rank": 2, "method": "dora"})]
    trials = [Trial(tmp_path / f"t{i}", recipe, cache) for i, recipe in enumerate(recipes)]

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    train_pack(base, trials, Callbacks(fail))
    for trial in trials:
        train(base, cache, trial.recipe, tmp_path / "alone" / trial.id)
        (found, wanted) = (
            load_checkpoint(list_checkpoints(folder)[-1].path).adapter
            for folder in (trial.trial_dir, tmp_path / "alone" / trial.id)
        )
        for key, tensor in wanted.items():
            # More padding makes other sums of the same numbers.
            assert (found[key] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), key


@pytest.mark.parametrize("name", ["zimage"], indirect=True)
def test_layers_that_take_captions_one_after_the_other_are_no_targets(base: Base) -> None:
    with pytest.raises(UserError, match=r"cap_embedder\.1, which no adapter"):
        target_layers(base, Network(targets="regex:."))
    with pytest.raises(UserError, match=r"network.targets[\s\S]*cap_embedder\.1, which no adapter"):
        check_on_base([small(base, network={"targets": "regex:."})], base.folder)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (128, 128), (96, 170)])
def test_the_shift_is_that_of_the_flux_pipeline(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift((size[0] // 2) * (size[1] // 2), 256, 4096, 0.5, 1.15)
    assert FlowShift(None).at(*size) == pytest.approx(np.exp(mu))


@pytest.mark.parametrize("name", ["flux-dev"], indirect=True)
def test_the_times_of_a_bucket_are_shifted_by_its_own_tokens(
    base: Base, make_cache: Callable[..., LatentCache]
) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    sizes = [(64, 64), (32, 100)]
    logits = []
    for height, width in sizes:
        cache = make_cache(base, buckets={(height, width): 2})
        batch = draw_batch(small(base), cache, 0, range(4), 4, base.objective)
        mu = calculate_shift((height // 2) * (width // 2), 256, 4096, 0.5, 1.15)
        logits.append(torch.logit(batch.timesteps / FLOW_TIMESTEPS) - mu)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_predictions_at_any_shape_are_those_of_diffusers(base: Base, pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((4, 12), (10, 6)):
        noisy = torch.randn(2, base.latent_channels, height, width, generator=generator)
        told = {
            **base.encode_prompts(PROMPTS),
            **{
                name: tensor.expand(2, -1)
                for name, tensor in base.picture_conditions((30, 90), (0, 3), (32, 96)).items()
            },
        }
        times = torch.tensor([100, 700])
        if base.is_flow:
            times = times.float()
        batch = SimpleNamespace(conditions=told, timesteps=times)
        with torch.no_grad():
            found = base.predict(noisy, times, told)
            wanted = forward(base, getattr(pipeline, base.denoiser_name), noisy, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_flow_times_are_logit_normal_and_shifted() -> None:
    """The logit of an unshifted time is standard normal; a shift s moves the logit by ln s."""
    objective = FlowMatching(FlowShift(3.0))
    recipe = fit_recipe(Recipe(), "sd3", "test")
    generator = torch.Generator().manual_seed(0)
    draws = [objective.draw_timestep(recipe, generator, torch.Size((1, 8, 8))) for _ in range(4000)]
    logits = torch.logit(torch.stack(draws) / FLOW_TIMESTEPS)
    assert abs(float(logits.mean()) - np.log(3.0)) < 0.05
    assert abs(float(logits.std()) - 1) < 0.05


def test_sdxl_is_told_size_and_place_of_the_crop(
    load_once: OfName, load_pipeline_once: OfName
) -> None:
    told = load_once("sdxl").picture_conditions((300, 200), (16, 0), (64, 96))["time_ids"]
    wanted = load_pipeline_once("sdxl")._get_add_time_ids(
        (300, 200), (16, 0), (64, 96), torch.float32, 32
    )
    assert torch.equal(told, wanted[0])
