"""Loading: what can be loaded, what is refused before its weights are, and what the error says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub
import numpy as np
import pytest
import torch
from families import draw as image
from httpx import Request, Response
from safetensors.torch import load_file, save_file
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from tiny_families import BUILDERS

from elakit.errors import ModelError, SettingError
from elakit.models import EMBEDDED, GenerationSettings, adapter_for, default_settings, embedded, load, source
from elakit.models.portable import drop_folders, write_portable_names
from elakit.resources import data_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    target = tmp_path / "copy"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(folder)).write_bytes(file.read_bytes())
    return target


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(source, "hf_hub_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_folder_gives_the_pipeline_that_was_saved(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = load(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(image(pipe), image(tiny_pipeline()))
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    half = load(str(folder), device="cpu", dtype="bfloat16")
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}


@pytest.mark.usefixtures("no_network")
def test_a_built_in_model_is_looked_up_in_the_shipped_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "data_path", lambda *parts: folder.parent.joinpath("tiny"))
    pipe = load("picture-world", device="cpu")
    assert pipe.unet.dtype == torch.float32
    model = EMBEDDED["picture-world"]
    assert default_settings(pipe) == GenerationSettings(model.steps, model.guidance_scale)
    monkeypatch.setattr(embedded, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(ModelError, match="missing from this installation"):
        load("picture-world")


def test_other_pipelines_keep_their_own_defaults(pipe: Any) -> None:
    assert default_settings(pipe) == GenerationSettings(50, 7.5)


def test_the_default_scale_is_that_of_the_argument_which_guides() -> None:
    pipe = BUILDERS["Qwen-Image"]()

    class Older(type(pipe)):
        """The call of diffusers 0.35, where an argument without effect has a default, too."""

        def __call__(self, prompt=None, true_cfg_scale=4.0, num_inference_steps=50, guidance_scale=1.0):
            raise NotImplementedError

    pipe.__class__ = Older
    assert default_settings(pipe) == GenerationSettings(50, 4.0)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("image-wrld", "Did you mean 'picture-world'"),
        ("Picture World", "Did you mean 'picture-world'"),
        ("sd15", "Unknown model 'sd15'"),
        ("", "Unknown model ''"),
        ("models/of/mine", "Unknown model 'models/of/mine'"),
        ("./runs/model", "Unknown model"),
        ("/no/such/folder", "Unknown model"),
    ],
)
def test_a_name_that_can_be_nothing_fails_at_once(name: str, part: str) -> None:
    with pytest.raises(ModelError, match=part) as error:
        load(name)
    for expected in ("picture-world", "folder", "hub id"):
        assert expected in str(error.value)


@pytest.mark.usefixtures("no_network")
def test_paths_that_hold_no_pipeline_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load(tmp_path)
    weights = tmp_path / "v1-5.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ModelError, match="single file"):
        load(weights)


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, hub.HfHubHTTPError):
        return kind("refused", response=Response(404, request=Request("GET", "https://hub")))
    return kind("refused")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (hub.LocalEntryNotFoundError, "cannot be reached"),
        (hub.RepositoryNotFoundError, "no such model on the hub"),
        (hub.GatedRepoError, "license"),
        (getattr(hub, "RemoteEntryNotFoundError", hub.EntryNotFoundError), "not a diffusers pipeline"),
        (hub.HfHubHTTPError, "refused"),
    ],
)
def test_a_hub_id_that_cannot_be_had_says_why(kind: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(source, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=part) as error:
        load("someone/some-model")
    assert "'someone/some-model'" in str(error.value)
    assert "picture-world" in str(error.value)


def test_a_wrong_family_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "hf_hub_download", lambda *_: str(tmp_path / "index.json"))
    allegro = {"_class_name": "AllegroPipeline", "transformer": ["diffusers", "AllegroTransformer3DModel"]}
    without = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    for index, part in (
        (allegro, "has the class AllegroTransformer3DModel"),
        (without, "UNet2DModel, which does not attend"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=part):
            load("someone/some-model")


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3, tiny_pixart, tiny_flux])
@pytest.mark.usefixtures("no_network")
def test_every_family_is_loaded_from_a_folder(make: Any, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert adapter_for(loaded).family == adapter_for(pipe).family
    assert [layer.name for layer in adapter_for(loaded).layers()] == [x.name for x in adapter_for(pipe).layers()]


def test_code_that_comes_with_a_model_is_never_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    code = f"open({str(marker)!r}, 'w')\nclass Mine: pass\n"
    (copy / "mine.py").write_text(code)
    (copy / "unet" / "mine.py").write_text(code)
    change_index(copy, _class_name=["mine", "Mine"])
    with pytest.raises(ModelError, match="runs no code"):
        load(copy)
    change_index(copy, _class_name="StableDiffusionPipeline", unet=["mine", "Mine"])
    with pytest.raises(ModelError, match="takes its unet from the library 'mine'"):
        load(copy)
    assert not marker.exists()


def test_pickled_weights_are_refused(copy: Path) -> None:
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        weights = copy / f"{part}.safetensors"
        saved = weights.read_bytes()
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
        with pytest.raises(ModelError, match="safetensors"):
            load(copy, device="cpu")
        weights.write_bytes(saved)


def test_a_damaged_folder_says_so(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        load(copy, device="cpu")
    (copy / "model_index.json").write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy, device="cpu")
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"names the pipeline's components\. Download"):
        load(copy, device="cpu")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "gpu"}, "'gpu'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"dtype": "int8"}, "float32, float16"),
        ({"dtype": 16}, "dtype=16: choose from float32"),
    ],
)
def test_devices_and_precisions_that_do_not_exist(folder: Path, options: dict[str, Any], part: str) -> None:
    if torch.cuda.is_available() and "device" in options and "cuda" in options["device"]:
        pytest.skip("tells what happens on a machine without CUDA")
    with pytest.raises(SettingError, match=part):
        load(folder, **options)


def test_weights_of_another_variant_are_named_and_loaded(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ModelError, match="pass variant='fp16'"):
        load(tmp_path, device="cpu")
    pipe = load(tmp_path, device="cpu", variant="fp16")
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(image(pipe), image(tiny_pipeline()))
    with pytest.raises(SettingError, match=r"variant='\.\./fp16'"):
        load(tmp_path, variant="../fp16")


@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_a_missing_or_unknown_weight_is_named(copy: Path, part: str) -> None:
    """A text encoder with one tensor missing would be filled with random numbers without notice."""
    path = copy / f"{part}.safetensors"
    whole = {name: value.clone() for name, value in load_file(path).items()}  # the file is overwritten below
    lost = next(name for name in whole if name.endswith("weight"))
    save_file({name: value for name, value in whole.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{part.partition('/')[0]} .* 1 weight missing .*{lost}"):
        load(copy, device="cpu")
    save_file(whole | {"surplus.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"not known to this class \(surplus.weight\)"):
        load(copy, device="cpu")


def test_an_index_of_weights_that_names_a_pickle_is_refused(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    names = list(load_file(weights))
    torch.save(load_file(weights), weights.with_name("model-00001-of-00001.bin"))
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.bin")}
    (copy / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names the file 'model-00001-of-00001.bin'"):
        load(copy, device="cpu")


def test_the_shipped_text_encoder_has_names_that_every_release_reads() -> None:
    """transformers before 5.6 knows "text_model.embeddings..." only; later releases read both forms."""
    names = load_file(data_path("picture-world") / "text_encoder" / "model.safetensors")
    assert names
    assert all(name.startswith("text_model.") for name in names)


def test_a_saved_text_encoder_gets_names_that_every_release_reads(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    for _ in range(2):  # the second time there is nothing to do
        write_portable_names(copy)
        assert all(name.startswith("text_model.") for name in load_file(path))
    pipe = load(copy, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(image(pipe), image(tiny_pipeline()))


def test_a_saved_pipeline_names_no_folder_of_the_machine_that_trained_it(tmp_path: Path) -> None:
    config = tmp_path / "vae" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"_name_or_path": "/home/me/work/vae", "sizes": [1, 2], "word": "é"}))
    for _ in range(2):  # the second time there is nothing to do
        drop_folders(tmp_path)
        assert json.loads(config.read_text(encoding="utf-8")) == {"sizes": [1, 2], "word": "é"}


def components(pipeline: str, encoder: list[str]) -> dict[str, Any]:
    return {"_class_name": pipeline, "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": encoder}


LOOKALIKES = {
    "DeepFloyd IF": components("IFPipeline", ["transformers", "T5EncoderModel"]),
    "AltDiffusion": components("AltDiffusionPipeline", ["transformers", "XLMRobertaModel"]),
    "InstructPix2Pix": components("StableDiffusionInstructPix2PixPipeline", ["transformers", "CLIPTextModel"]),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_stable_diffusion_is_refused_before_its_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.json").write_text(json.dumps(LOOKALIKES[name]))
    monkeypatch.setattr(source, "hf_hub_download", lambda *_: str(tmp_path / "index.json"))
    with pytest.raises(ModelError, match=r"text encoder is a|three passes"):
        load("someone/some-model")


def test_an_old_peft_is_named_by_every_command_that_needs_diffusers(tmp_path: Path) -> None:
    """Only the extra `lora` has a bound for peft, so another package may have brought an older one along."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("")
    (tmp_path / "peft-0.13.0.dist-info").mkdir()
    (tmp_path / "peft-0.13.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.13.0\n")
    code = """
import sys
import elakit
from elakit.attention import record
from elakit.cli import main
from elakit.doctor import report
print(dict(report())["models"])
sys.argv = ["elakit", "diagnose", "a [cat] and a [lion]"]
main()
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    said = "peft 0.13.0 is installed, but diffusers needs peft 0.17 or later. Run `pip install -U 'peft>=0.17'`"
    assert done.returncode == 2, done.stderr
    assert said in done.stdout
    assert done.stderr.splitlines()[-1].startswith("elakit: diffusers cannot be imported (")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_of_another_maker_is_refused_where_it_is_absent(folder: Path) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("describes a machine without MPS")
    with pytest.raises(SettingError, match="no usable mps device"):
        load(folder, device="mps")
