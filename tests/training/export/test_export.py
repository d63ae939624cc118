"""Exported files: what is in them, that other loaders get the trained adapter, and refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_effects import as_comfyui_does, assert_same_effect, random_adapter
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from captioning import DatasetVersion, UserError
from training.checkpoints import Contents, load_checkpoint, save_checkpoint
from training.export import VerificationError, export_adapter
from training.export import adapter as export_module
from training.export.kohya import kohya_name
from training.export.updates import read_updates
from training.export.verify import verify
from training.families import Base
from training.pack.adapters import attach, detach, initial_adapter, load_adapter
from training.recipe import Network, Recipe

# Four transformer blocks with two attentions of four layers, and two feed-forward layers, each.
LAYERS = {"attention": 32, "attention+ff": 40}
METHODS = ["lora", "dora-output", "dora-input"]
Trained = Callable[..., Path]


def recipe_of(method: str, targets: str = "attention", alpha: float | None = None) -> Recipe:
    """`method` is lora, dora-output or dora-input."""
    name, _, axis = method.partition("-")
    network = {"method": name, "rank": 4, "alpha": alpha, "targets": targets}
    if axis:
        network["dora_axis"] = axis
    return Recipe.model_validate({"network": network, "steps": 10, "seed": 7})


@pytest.fixture
def trained(tmp_path: Path, tiny_v_base: Base) -> Trained:
    """Makes a checkpoint of a recipe on the tiny base."""

    def make(recipe: Recipe, size: float = 0.2) -> Path:
        state = random_adapter(tiny_v_base, recipe, size)
        return save_checkpoint(tmp_path / "trial", 10, recipe, state, {}).path

    return make


def pipeline_of(base: Base) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoders["text_encoder"],
        tokenizer=base.tokenizers["tokenizer"],
        unet=base.denoiser,
        scheduler=DDIMScheduler.from_pretrained(base.folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def outputs(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(2, base.latent_channels, 8, 8, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)
    with torch.no_grad():
        return base.predict(latents, torch.tensor([200, 900]), {"text": text})


def merge_with_peft(base: Base, contents: Contents) -> None:
    """Add the adapter to the base's weights with nothing but PEFT."""
    network = contents.recipe.network
    modules = {name.removeprefix("unet.").split(".lora_")[0] for name in contents.adapter}
    config = LoraConfig(
        r=network.rank,
        lora_alpha=network.effective_alpha,
        target_modules=sorted(modules),
        use_dora=network.method == "dora",
    )
    base.denoiser.add_adapter(config, adapter_name="default")
    plain = {name.removeprefix("unet."): tensor for name, tensor in contents.adapter.items()}
    set_peft_model_state_dict(base.denoiser, plain, adapter_name="default")
    base.denoiser.fuse_lora()
    base.denoiser.unload_lora()


def merge_with_dora_by_input(base: Base, contents: Contents) -> None:
    """Change the base's weights by the formula: W' = m·V/‖V‖ with the norms of V's columns."""
    network = contents.recipe.network
    for name, parameter in base.denoiser.named_parameters():
        key = "unet." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" not in contents.adapter:
            continue
        down, up = (contents.adapter[f"{key}.lora_{part}.weight"] for part in "AB")
        full = parameter.data + network.effective_alpha / network.rank * up @ down
        for column in range(full.shape[1]):
            full[:, column] /= full[:, column].square().sum().sqrt()
            full[:, column] *= contents.adapter[f"{key}.lora_input_magnitude"][column]
        parameter.data = full


@pytest.mark.parametrize(("targets", "alpha"), [("attention", 1.0), ("attention+ff", None)])
@pytest.mark.parametrize("method", METHODS)
def test_diffusers_pipeline_gets_the_trained_adapter(
    method: str,
    alpha: float | None,
    targets: str,
    trained: Trained,
    tiny_v_base: Base,
    tmp_path: Path,
) -> None:
    checkpoint = trained(recipe_of(method, targets, alpha))
    report = export_adapter(checkpoint, tiny_v_base, tmp_path / "zara.safetensors", "diffusers")
    plain = outputs(tiny_v_base)
    contents = load_checkpoint(checkpoint)
    load_adapter(tiny_v_base, contents.adapter, contents.recipe.network)
    wanted = outputs(tiny_v_base)
    detach(tiny_v_base)
    pipeline_of(tiny_v_base).load_lora_weights(str(report.path))
    assert_same_effect(outputs(tiny_v_base), wanted, plain, 0.01)
    assert report.form == ("full" if method == "dora-input" else "peft")
    assert report.max_error < 0.01 * report.effect
    assert report.modules == LAYERS[targets]


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize(("targets", "alpha"), [("attention", 1.0), ("attention+ff", None)])
def test_kohya_lora_loads_in_diffusers(
    alpha: float | None,
    targets: str,
    rank_stabilised: bool,
    trained: Trained,
    tiny_v_base: Base,
    tmp_path: Path,
) -> None:
    plain_recipe = recipe_of("lora", targets, alpha)
    network = plain_recipe.network.model_copy(update={"rank_stabilised": rank_stabilised})
    checkpoint = trained(plain_recipe.model_copy(update={"network": network}))
    report = export_adapter(checkpoint, tiny_v_base, tmp_path / "zara.safetensors", "kohya")
    plain = outputs(tiny_v_base)
    contents = load_checkpoint(checkpoint)
    load_adapter(tiny_v_base, contents.adapter, contents.recipe.network)
    wanted = outputs(tiny_v_base)
    detach(tiny_v_base)
    pipeline_of(tiny_v_base).load_lora_weights(str(report.path))
    assert_same_effect(outputs(tiny_v_base), wanted, plain, 0.01)
    assert report.form == "lora" and report.max_error < 0.01 * report.effect


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["attention", "attention+ff"])
def test_kohya_entries_are_the_change_of_the_weights(
    method: str, targets: str, trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    checkpoint = trained(recipe_of(method, targets, alpha=2.0))
    path = tmp_path / "zara.safetensors"
    export_adapter(checkpoint, tiny_v_base, path, "kohya", dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in tiny_v_base.denoiser.named_parameters()}
    contents = load_checkpoint(checkpoint)
    merge = merge_with_dora_by_input if method == "dora-input" else merge_with_peft
    merge(tiny_v_base, contents)
    entries = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    changed = 0
    for name, parameter in tiny_v_base.denoiser.named_parameters():
        wanted = (parameter.detach() - before[name]).numpy()
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{module}.diff" in entries:
            found = entries[f"{module}.diff"]
        elif f"{module}.alpha" in entries:
            down = entries[f"{module}.lora_down.weight"]
            scale = entries[f"{module}.alpha"] / down.shape[0]
            found = scale * entries[f"{module}.lora_up.weight"] @ down
            if f"{module}.dora_scale" in entries:
                found = as_comfyui_does(
                    before[name].numpy(), found, entries[f"{module}.dora_scale"]
                )
        else:
            assert not wanted.any(), name
            continue
        changed += 1
        assert np.abs(found - wanted).max() < 1e-5
    assert changed == LAYERS[targets]


def test_kohya_lora_has_exactly_the_names_that_tools_know(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    path = tmp_path / "zara.safetensors"
    export_adapter(trained(recipe_of("lora", alpha=1.0)), tiny_v_base, path, "kohya")
    tensors = load_file(path)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    for layer in ("attn1_to_q", "attn2_to_k", "attn2_to_v", "attn1_to_out_0"):
        down = tensors[f"{block}{layer}.lora_down.weight"]
        up = tensors[f"{block}{layer}.lora_up.weight"]
        alpha = tensors[f"{block}{layer}.alpha"]
        assert down.shape[0] == up.shape[1] == 4
        assert alpha.shape == () and float(alpha) == 4  # folded: readers scale by alpha / rank
        assert down.dtype == up.dtype == torch.float16
    assert len(tensors) == LAYERS["attention"] * 3


def test_a_dora_by_output_in_kohya_naming_is_a_diff_and_never_a_dora_scale(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    path = tmp_path / "zara.safetensors"
    report = export_adapter(trained(recipe_of("dora-output")), tiny_v_base, path, "kohya")
    assert report.form == "diff"
    assert all(name.endswith(".diff") for name in load_file(path))


def test_a_dora_by_input_in_kohya_naming_is_the_file_that_tools_compute(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    path = tmp_path / "zara.safetensors"
    report = export_adapter(trained(recipe_of("dora-input")), tiny_v_base, path, "kohya")
    assert report.form == "dora"
    tensors = load_file(path)
    scales = {name: t for name, t in tensors.items() if name.endswith(".dora_scale")}
    assert len(scales) == LAYERS["attention"] and len(tensors) == 4 * len(scales)
    for name, scale in scales.items():
        down = tensors[name.replace("dora_scale", "lora_down.weight")]
        # A row: of (out, 1) the tools would compute something else, and of (in,) none of them.
        assert scale.shape == (1, down.shape[1]) and scale.dtype == torch.float32
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["lorafarm.dora_axis"] == "input"
    assert json.loads(header["ss_network_args"])["wd_on_output"] == "False"


def test_a_dora_by_input_for_diffusers_needs_no_header(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    """Its modules differ in rank; loaders that know nothing of it must scale each by 1."""
    path = tmp_path / "zara.safetensors"
    checkpoint = trained(recipe_of("dora-input", "attention+ff"))
    export_adapter(checkpoint, tiny_v_base, path, "diffusers")
    tensors = load_file(path)
    assert len({len(t) for name, t in tensors.items() if "lora_A" in name}) > 1
    save_file(tensors, path)
    contents = load_checkpoint(checkpoint)
    verify(path, tiny_v_base, contents.adapter, contents.recipe.network, "full")


def test_text_encoder_names_get_text_model_back(tiny_v_base: Base) -> None:
    wanted = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    module, prefixes = "encoder.layers.0.self_attn.q_proj", tiny_v_base.kohya_prefixes
    assert kohya_name("text_encoder", module, prefixes) == wanted
    assert kohya_name("text_encoder", f"text_model.{module}", prefixes) == wanted


def test_the_header_tells_of_buckets(trained: Trained, tiny_v_base: Base, tmp_path: Path) -> None:
    recipe = recipe_of("lora").model_copy(update={"aspect_buckets": True})
    export_adapter(trained(recipe), tiny_v_base, tmp_path / "out.safetensors", "kohya")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_enable_bucket"] == "True"


def test_the_header_tells_tools_what_they_show(
    trained: Trained, tiny_v_base: Base, tiny_dataset: DatasetVersion, tmp_path: Path
) -> None:
    path = tmp_path / "zara_sd15.safetensors"
    export_adapter(
        trained(recipe_of("lora", alpha=2.0)),
        tiny_v_base,
        path,
        "kohya",
        {"modelspec.title": "Zara", "ss_training_comment": "for the tests"},
        dataset=tiny_dataset,
    )
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "Zara"
    assert header["ss_training_comment"] == "for the tests"
    assert header["ss_output_name"] == "zara_sd15"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header["modelspec.resolution"] == "64x64"
    assert header["modelspec.trigger_phrase"] == "zkw"
    assert (header["ss_v2"], header["ss_base_model_version"]) == ("False", "sd_v1_v")
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")
    assert header["lorafarm.alpha"] == "2.0" and header["ss_steps"] == "10"
    assert "ss_enable_bucket" not in header
    assert str(tmp_path) not in json.dumps(header)
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(body).hexdigest()


def test_the_same_export_gives_the_same_bytes(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    checkpoint = trained(recipe_of("dora-input"))
    reports = [
        export_adapter(checkpoint, tiny_v_base, tmp_path / folder / "zara.safetensors", "kohya")
        for folder in ("a", "b")
    ]
    assert reports[0].sha256 == reports[1].sha256
    assert reports[0].sha256 == hashlib.sha256(reports[1].path.read_bytes()).hexdigest()


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", METHODS)
def test_export_leaves_the_base_as_it_was_with_and_without_an_adapter(
    method: str, format: str, trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    recipe = recipe_of(method)
    checkpoint = trained(recipe)
    bare = export_adapter(checkpoint, tiny_v_base, tmp_path / "a.safetensors", format)
    attach(tiny_v_base, recipe.network, seed=3)
    before = {name: t.clone() for name, t in tiny_v_base.denoiser.state_dict().items()}
    other = export_adapter(checkpoint, tiny_v_base, tmp_path / "a.safetensors", format)
    after = tiny_v_base.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bare.sha256 == other.sha256


def test_an_untrained_adapter_changes_nothing_and_exports(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    for method in METHODS:
        state = initial_adapter(tiny_v_base, recipe_of(method).network, seed=0)
        path = save_checkpoint(tmp_path / method, 1, recipe_of(method), state, {}).path
        for format in ("kohya", "diffusers"):
            report = export_adapter(path, tiny_v_base, tmp_path / "a.safetensors", format)
            assert report.effect < 1e-5 and report.max_error < 1e-4


Damage = Callable[[dict[str, torch.Tensor]], None]


def _halve_alpha(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = tensors[name] / 2


def _foreign_key(tensors: dict[str, torch.Tensor]) -> None:
    first = min(tensors)
    tensors[first.replace("down_blocks_0", "down_blocks_7")] = tensors[first].clone()


def _lost_module(tensors: dict[str, torch.Tensor]) -> None:
    first = min(tensors).split(".")[0]
    for name in [name for name in tensors if name.startswith(first)]:
        del tensors[name]


def _swapped_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith(("lora_up.weight", ".diff")):
            tensors[name] = tensors[name].flip(0)


def _lost_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".dora_scale")]:
        del tensors[name]


def _scales_of_the_other_axis(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith(".dora_scale"):
            tensors[name] = tensors[name].T


def _not_finite(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(("lora_up.weight", ".diff")))
    tensors[name][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("method", "damage"),
    [
        ("lora", _halve_alpha),
        ("dora-input", _halve_alpha),
        ("dora-input", _lost_scales),
        ("dora-input", _scales_of_the_other_axis),
        *[
            (method, damage)
            for method in METHODS
            for damage in (_foreign_key, _lost_module, _swapped_rows, _not_finite)
        ],
    ],
)
def test_verification_rejects_a_damaged_file(
    method: str, damage: Damage, trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    checkpoint = trained(recipe_of(method))
    path = tmp_path / "zara.safetensors"
    report = export_adapter(checkpoint, tiny_v_base, path, "kohya")
    tensors = load_file(path)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    contents = load_checkpoint(checkpoint)
    with pytest.raises(VerificationError, match="zara"):
        verify(path, tiny_v_base, contents.adapter, contents.recipe.network, report.form)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", METHODS)
def test_a_failed_verification_leaves_no_file_and_keeps_the_older_one(
    method: str,
    format: str,
    trained: Trained,
    tiny_v_base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = trained(recipe_of(method))
    # An exporter that writes half of the update.
    monkeypatch.setattr(export_module, "read_updates", _half_updates)
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match="outputs differ"):
        export_adapter(checkpoint, tiny_v_base, out / "zara.safetensors", format)
    assert list(out.iterdir()) == []
    (out / "zara.safetensors").write_bytes(b"older")
    with pytest.raises(VerificationError):
        export_adapter(checkpoint, tiny_v_base, out / "zara.safetensors", format)
    assert [path.read_bytes() for path in out.iterdir()] == [b"older"]


def _half_updates(state: dict[str, torch.Tensor], network: Network) -> list:
    halved = {k: t / 2 if "lora_B" in k else t for k, t in state.items()}
    return read_updates(halved, network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"unet.conv_in.weight": torch.ones(3)}), "conv_in"),
        (lambda s: s.update({"vae.a.lora_A.weight": torch.ones(3)}), "vae.a"),
        (lambda s: s.pop(min(s)), "expected lora_A, lora_B"),
        (lambda s: s.update({min(s): torch.full((4, 16), torch.inf)}), "not finite"),
        (lambda s: s.update({min(s): torch.ones(4, 16, 1, 1)}), "no update of a linear layer"),
    ],
)
def test_an_adapter_that_is_none_is_refused(
    change: Callable, message: str, tiny_v_base: Base, tmp_path: Path
) -> None:
    recipe = recipe_of("lora")
    state = random_adapter(tiny_v_base, recipe)
    change(state)
    path = save_checkpoint(tmp_path / "trial", 10, recipe, state, {}).path
    with pytest.raises(UserError, match=message):
        export_adapter(path, tiny_v_base, tmp_path / "a.safetensors", "kohya")
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_adapter_of_another_base_is_refused(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    for method, format in (("lora", "kohya"), ("dora-output", "kohya"), ("lora", "diffusers")):
        recipe = recipe_of(method)
        state = {
            name.replace("down_blocks.0", "down_blocks.5"): tensor
            for name, tensor in random_adapter(tiny_v_base, recipe).items()
        }
        path = save_checkpoint(tmp_path / method, 10, recipe, state, {}).path
        with pytest.raises(UserError, match="adapter"):
            export_adapter(path, tiny_v_base, tmp_path / "a.safetensors", format)
        assert not list(tmp_path.glob("*.safetensors"))


def test_values_beyond_fp16_are_refused_and_fit_into_fp32(
    trained: Trained, tiny_v_base: Base, tmp_path: Path
) -> None:
    checkpoint = trained(recipe_of("lora", alpha=4e6))
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="do not fit into float16"):
        export_adapter(checkpoint, tiny_v_base, path, "kohya")
    export_adapter(checkpoint, tiny_v_base, path, "kohya", dtype=torch.float32)


def test_wrong_requests_are_refused(trained: Trained, tiny_v_base: Base, tmp_path: Path) -> None:
    checkpoint = trained(recipe_of("lora"))
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"name it a\.safetensors"):
        export_adapter(checkpoint, tiny_v_base, tmp_path / "a.ckpt", "kohya")
    with pytest.raises(UserError, match="unknown"):
        export_adapter(checkpoint, tiny_v_base, path, "comfy")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no whole checkpoint"):
        export_adapter(tmp_path / "step-000099", tiny_v_base, path, "kohya")
    with pytest.raises(UserError, match="exporter itself"):
        export_adapter(checkpoint, tiny_v_base, path, "kohya", {"sshs_model_hash": "0"})
    with pytest.raises(UserError, match="makes a header"):
        export_adapter(
            checkpoint, tiny_v_base, path, "kohya", {"modelspec.thumbnail": "x" * 1_000_000}
        )
    with pytest.raises(ValueError, match="bfloat16"):
        export_adapter(checkpoint, tiny_v_base, path, "kohya", dtype=torch.bfloat16)
