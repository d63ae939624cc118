"""Single-file checkpoints: every tensor arrives, once, and everything else is refused in words."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from original_layout import UNET, VAE, configs_only, sd2, sd15, sdxl
from original_transformers import flux, flux2, qwen_image, sd3, z_image
from safetensors.torch import load_file, save_file
from tiny_families import build, build_sd2, build_sd3, build_sdxl
from torch import Tensor

from captioning import UserError
from training import Recipe, check_on_base
from training.families import (
    Base,
    absolute_base,
    base_facts,
    base_hash,
    family_of,
    load_base,
    native_size_px,
)

# The least number of layers by which diffusers tells SDXL's second encoder from others, and the one
# by which it knows an SD3.5-large, of any width.
TELLING_LAYERS, LARGE_LAYERS = 10, 38
# The width of the real FLUX.1, and of the small one.
FLUX_WIDTH, NARROW = 3072, 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def converts_to_the_shared_cache(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))


@pytest.fixture
def cache(
    converts_to_the_shared_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where conversions go: a folder of the test's own, at first without any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lorafarm" / "bases"


@pytest.fixture(scope="module")
def folders(tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models in diffusers layout; read them, never change them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        xl = build_sdxl(tmp_path_factory.mktemp("sdxl"), layers=TELLING_LAYERS)
        # diffusers knows a file of it by the second layer of a block.
        second = build_sd2(tmp_path_factory.mktemp("sd2"), layers=2)
    return {"sd15": tiny_base_path, "sd15-sd2": second, "sdxl": xl}


@pytest.fixture(scope="module")
def tensors(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """The same models as the tensors of a single file."""
    writers = {"sd15": sd15, "sd15-sd2": sd2, "sdxl": sdxl}
    return {name: write_out(folders[name]) for name, write_out in writers.items()}


@pytest.fixture(scope="module")
def configs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their configs and tokenizers alone."""
    root = tmp_path_factory.mktemp("configs")
    return {name: configs_only(folder, root / name) for name, folder in folders.items()}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", ["sd15", "sd15-sd2", "sdxl"])
def test_every_tensor_and_config_is_that_of_the_folder(
    name: str,
    folders: dict[str, Path],
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "model.safetensors", tensors[name])
    base = load_base(f"{file}@{configs[name]}")
    assert base.family == name.split("-")[0]
    assert base.id == str(file)
    found, wanted = weights(base.folder), weights(folders[name])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for part in base.components:
        for path in (folders[name] / part).glob("*.json"):
            copy = base.folder / part / path.name
            assert json.loads(copy.read_text()) == json.loads(path.read_text())
    prompts = ["zkw, person"]
    for key, tensor in load_base(folders[name]).encode_prompts(prompts).items():
        assert torch.equal(base.encode_prompts(prompts)[key], tensor)


def test_all_facts_are_had_from_one_conversion_that_is_kept(
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"{write(tmp_path / 'model.safetensors', tensors['sd15'])}@{configs['sd15']}"
    facts = base_facts(name)
    assert (facts.source, facts.family) == (name, "sd15")
    assert facts.content_hash == base_hash(name) == load_base(name).content_hash
    assert (family_of(name).family, native_size_px(name)) == ("sd15", 64)
    with pytest.raises(UserError, match="to_qq"):
        check_on_base([Recipe.model_validate({"network": {"targets": "regex:to_qq"}})], name)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    # Only our own lines count: other tests may have let libraries' warnings through to the root.
    converted = [record for record in caplog.records if record.name.startswith("training.")]
    (line,) = (record.getMessage() for record in converted)
    assert "converting once" in line and str(folder) in line


def test_the_same_file_gives_the_same_hash_wherever_it_is_converted(
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trials are named by it: a second machine must find the same ones."""
    first = base_hash(f"{write(tmp_path / 'a.safetensors', tensors['sd15'])}@{configs['sd15']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    copied = shutil.copytree(configs["sd15"], tmp_path / "copied")
    assert base_hash(f"{write(tmp_path / 'b.safetensors', tensors['sd15'])}@{copied}") == first


def test_a_changed_file_is_another_base(
    tensors: dict[str, dict[str, Tensor]], configs: dict[str, Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "model.safetensors", tensors["sd15"])
    first = base_hash(f"{file}@{configs['sd15']}")
    name = UNET + "out.2.bias"
    write(file, {**tensors["sd15"], name: tensors["sd15"][name] + 1})
    assert base_hash(f"{file}@{configs['sd15']}") != first


@pytest.mark.parametrize(
    ("family", "marks", "metadata", "prediction", "terminal"),
    [
        ("sdxl", ("v_pred", "ztsnr"), None, "v_prediction", True),
        ("sd15", ("v_pred",), None, "v_prediction", False),
        ("sd15", (), {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ("sd15", (), None, "epsilon", False),
    ],
)
def test_a_file_that_predicts_v_says_so(
    family: str,
    marks: tuple[str, ...],
    metadata: dict[str, str] | None,
    prediction: str,
    terminal: bool,
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    """NoobAI-XL's v models hold two empty tensors; diffusers passes over them."""
    marked = {**tensors[family], **{name: torch.zeros(0) for name in marks}}
    file = write(tmp_path / "model.safetensors", marked, metadata)
    base = load_base(f"{file}@{configs[family]}")
    assert base.objective.prediction_type == prediction
    last = float(base.objective.alphas_cumprod[-1])  # type: ignore[attr-defined]
    assert (last == 0.0) == terminal
    sampler = base.sampler(4, torch.zeros(1, 4, 8, 8))
    assert sampler.config.prediction_type == prediction
    assert int(sampler.timesteps[0]) == (999 if terminal else 751)
    config = json.loads((configs[family] / "scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "epsilon"  # the folder that lends its configs is untouched


def test_each_part_keeps_its_precision(
    tensors: dict[str, dict[str, Tensor]], configs: dict[str, Path], tmp_path: Path
) -> None:
    """Half encoders beside a full VAE, as many fine-tunes are; fp8 becomes bf16, which loads."""
    stored = {
        name: tensor.to(torch.float8_e4m3fn)
        if name.startswith(UNET)
        else tensor.half()
        if not name.startswith(VAE)
        else tensor
        for name, tensor in tensors["sd15"].items()
    }
    file = write(tmp_path / "model.safetensors", stored)
    found = weights(load_base(f"{file}@{configs['sd15']}").folder)
    wanted = stored[UNET + "input_blocks.0.0.weight"].to(torch.bfloat16)
    assert torch.equal(found["unet/conv_in.weight"], wanted)
    encoder = {t.dtype for name, t in found.items() if name.startswith("text_encoder/")}
    assert encoder == {torch.float16}
    full = tensors["sd15"][VAE + "encoder.conv_in.weight"]
    assert torch.equal(found["vae/encoder.conv_in.weight"], full)


def test_what_the_file_lacks_is_borrowed_from_a_whole_folder(
    folders: dict[str, Path],
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    """A UNet alone, of which diffusers would not know the family."""
    alone = {name: tensor for name, tensor in tensors["sdxl"].items() if name.startswith(UNET)}
    alone = {name: tensor + 1 for name, tensor in alone.items()}
    file = write(tmp_path / "unet.safetensors", alone)
    base = load_base(f"{file}@{folders['sdxl']}")
    assert base.family == "sdxl"
    found, wanted = weights(base.folder), weights(folders["sdxl"])
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor + 1 if name.startswith("unet/") else tensor)
    without = {n: t for n, t in tensors["sdxl"].items() if not n.startswith(VAE)}
    file = write(tmp_path / "no-vae.safetensors", without)
    with pytest.raises(UserError, match=r"holds no vae, and .* has none either.*whole model"):
        load_base(f"{file}@{configs['sdxl']}")


@pytest.fixture(autouse=True)
def flux_may_be_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' reader takes FLUX.1's layers apart at 3072, whatever a config says.

    One block of each kind would have 480 million weights. Only that number is replaced.
    """
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    assert code.co_consts.count(FLUX_WIDTH) == 1
    narrow = tuple(NARROW if one == FLUX_WIDTH else one for one in code.co_consts)
    monkeypatch.setattr(
        convert_flux_transformer_checkpoint_to_diffusers, "__code__", code.replace(co_consts=narrow)
    )


LONE: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": flux,
    "flux2-dev": flux2,
    "flux2-klein": flux2,
    "zimage": z_image,
    "qwen_image": qwen_image,
}


@pytest.fixture(scope="module")
def lone_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of which files hold the transformer, and seldom more; never change them."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name != "sd3":
            return build(name, folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_sd3(folder, layers=LARGE_LAYERS)

    return functools.cache(make)


@pytest.mark.parametrize("name", LONE)
def test_a_transformer_from_the_file_is_completed_from_the_folder(
    name: str, lone_once: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = lone_once(name)
    tensors = {key: tensor + 1 for key, tensor in LONE[name](folder).items()}
    base = load_base(f"{write(tmp_path / 'model.safetensors', tensors)}@{folder}")
    assert base.family == name.split("-")[0]
    found, wanted = weights(base.folder), weights(folder)
    assert found.keys() == wanted.keys()
    own = ("transformer/", "vae/") if name in {"sd3", "zimage"} else ("transformer/",)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor + 1 if key.startswith(own) else tensor), key
    index = json.loads((folder / "model_index.json").read_text())
    assert json.loads((base.folder / "model_index.json").read_text()) == index
    lacking = dict(list(tensors.items())[1:])
    file = write(tmp_path / "lacking.safetensors", lacking)
    with pytest.raises(UserError, match="its transformer lacks some of its weights"):
        load_base(f"{file}@{folder}")


def test_joined_layers_in_fp8_are_widened_and_taken_apart(
    lone_once: Callable[[str], Path], tmp_path: Path
) -> None:
    """Most of the files of FLUX.1 that are passed around are in plain fp8."""
    folder = lone_once("flux-dev")
    tensors = {key: t.to(torch.float8_e4m3fn) for key, t in flux(folder).items()}
    base = load_base(f"{write(tmp_path / 'model.safetensors', tensors)}@{folder}")
    found = load_file(base.folder / "transformer/diffusion_pytorch_model.safetensors")
    wanted = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor.to(torch.float8_e4m3fn).to(torch.bfloat16)), key


def test_lone_transformers_of_another_kind_are_refused(
    lone_once: Callable[[str], Path], tmp_path: Path
) -> None:
    klein = write(tmp_path / "klein.safetensors", flux2(lone_once("flux2-klein")))
    with pytest.raises(UserError, match=r"of Flux2KleinPipeline, but the folder of Flux2Pipeline"):
        load_base(f"{klein}@{lone_once('flux2-dev')}")
    tensors = qwen_image(lone_once("qwen_image"))
    edit = {**tensors, UNET + "__index_timestep_zero__": torch.zeros(0)}
    with pytest.raises(UserError, match=r"is a Qwen-Image-Edit-2511, which is shown pictures"):
        load_base(write(tmp_path / "edit.safetensors", edit))


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: {"lora_unet_mid.lora_down.weight": torch.zeros(1)}, "is an adapter"),
        (lambda _: {"unet.mid.lora_A.weight": torch.zeros(1)}, "is an adapter"),
        (lambda _: {"conv_in.weight": torch.zeros(1)}, "holds no unet of a known model"),
        (lambda _: {}, "holds no unet of a known model (nothing)"),
        (
            lambda t: {n: v for n, v in t.items() if n.startswith(VAE)},
            "holds no unet of a known model (only: vae)",
        ),
        (lambda t: {n: v for n, v in t.items() if n.startswith(UNET)}, "holds no vae and no text"),
        (lambda _: {"down_blocks.0.x": torch.zeros(1)}, "one network out of a diffusers folder"),
        (lambda t: {**t, UNET + "a.scale_weight": torch.ones(1)}, "its unet is quantised"),
        (lambda t: {**t, "edm_vpred.sigma_max": torch.ones(1)}, "EDM"),
        (
            lambda t: {**t, UNET + "input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)},
            "is a model of the kind 'inpainting'",
        ),
        (
            lambda t: {n: v for n, v in t.items() if n != UNET + "out.2.bias"},
            "its unet lacks some of its weights",
        ),
        (
            lambda t: {n: v for n, v in t.items() if not n.endswith("layers.1.mlp.fc2.bias")},
            "its text_encoder lacks ",
        ),
        (lambda t: {**t, UNET + "out.2.bias": torch.zeros(7)}, "could not be loaded"),
    ],
)
def test_other_files_are_refused_with_the_reason(
    change: Change,
    said: str,
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    cache: Path,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "model.safetensors", change(tensors["sd15"]))
    with pytest.raises(UserError) as caught:
        load_base(f"{file}@{configs['sd15']}")
    assert said in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert not [path for path in cache.glob("*") if path.is_dir()]  # nothing half-made is left


def test_files_that_are_no_checkpoints(tmp_path: Path, configs: dict[str, Path]) -> None:
    for name, said in [
        ("model.ckpt", "is a pickle"),
        ("model.pt", "is a pickle"),
        ("model.gguf", "is a .gguf file"),
        ("notes.md", "is a .md file"),
        ("model.safetensors", "no readable safetensors"),
    ]:
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(UserError, match=said):
            load_base(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        load_base(f"{tmp_path}/nothing.safetensors@{configs['sd15']}")


def test_without_configs_and_hub_the_fix_is_named(
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = write(tmp_path / "model.safetensors", tensors["sdxl"])
    with pytest.raises(UserError) as caught:
        load_base(file)
    assert "stabilityai/stable-diffusion-xl-base-1.0" in str(caught.value)
    assert f"write {file}@FOLDER" in str(caught.value)
    second = write(tmp_path / "second.safetensors", tensors["sd15-sd2"])
    with pytest.raises(UserError, match="stabilityai/stable-diffusion-2-1 could not be had"):
        load_base(second)
    with pytest.raises(UserError, match=r"of StableDiffusionXLPipeline, but the folder of"):
        load_base(f"{file}@{configs['sd15']}")
    with pytest.raises(UserError, match=r"model_index.json.*is missing"):
        load_base(f"{file}@{tmp_path}")


def test_the_configs_are_had_from_the_hubs_cache(
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a network, and without a word from the person."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub/models--stabilityai--stable-diffusion-xl-base-1.0"
    shutil.copytree(configs["sdxl"], model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = write(tmp_path / "model.safetensors", tensors["sdxl"])
    assert base_hash(file) == base_hash(f"{file}@{configs['sdxl']}")


def test_a_full_disk_is_said_before_anything_is_written(
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write(tmp_path / "model.safetensors", tensors["sd15"])
    usage: Any = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("training.families.conversion.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"GB free.*XDG_CACHE_HOME"):
        load_base(f"{file}@{configs['sd15']}")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_what_a_crash_left_is_made_again(
    tensors: dict[str, dict[str, Tensor]], configs: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    name = f"{write(tmp_path / 'model.safetensors', tensors['sd15'])}@{configs['sd15']}"
    folder = load_base(name).folder
    wanted = base_hash(name)
    half = folder.rename(folder.with_name(f".{folder.name}.converting"))
    (half / "model_index.json").unlink()
    assert base_hash(name) == wanted
    assert not half.exists()


def test_a_base_is_named_the_same_from_any_working_directory(
    tensors: dict[str, dict[str, Tensor]],
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    whole = f"{tmp_path}/model.safetensors"
    assert absolute_base("model.safetensors") == whole
    assert absolute_base("model.safetensors@config") == f"{whole}@{tmp_path}/config"
    assert absolute_base("model.safetensors@owner/name") == f"{whole}@owner/name"
    assert absolute_base("config") == f"{tmp_path}/config"
    assert absolute_base("owner/name") == "owner/name"


def test_a_base_from_a_file_is_a_base_like_any_other(
    tensors: dict[str, dict[str, Tensor]], configs: dict[str, Path], tmp_path: Path
) -> None:
    base: Base = load_base(
        f"{write(tmp_path / 'm.safetensors', tensors['sd15'])}@{configs['sd15']}"
    )
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = base.to_latents(base.encode_pixels(pixels)[0])
    output = base.predict(latents, torch.tensor([5]), base.encode_prompts(["zkw"]))
    assert output.shape == latents.shape and torch.isfinite(output).all()
