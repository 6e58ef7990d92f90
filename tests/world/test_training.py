"""The embedded model can be trained again by one command, and a training that was stopped goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from elakit.world.training.config import read_config

SMALL = """
[world]
size = 64
artists = ["fluent-3d"]
backgrounds = ["plain"]

[vae]
width = 8
encoder_blocks = [0, 0, 1, 1]
decoder_blocks = [1, 1, 0, 0]
latent_channels = 4
scenes = 16
samples = 16
polish = 8
crop = 32
crop_share = 0.5
batch = 4
learning_rate = 1e-3
noise = 0.1
pull = 1e-4
edges = 1.0

[text]
positions = 24
vocabulary = 1024
width = 32
layers = 1
heads = 2

[denoiser]
channels = [16, 32, 32]
heads = 2
scenes = 8
samples = 8
batch = 4
learning_rate = 1e-3
warmup = 1
min_snr = 5.0
drop_text = 0.1
neutral_end = 0.6

[judge]
channels = [8, 8, 8, 8]
scenes = 12
mixtures = 0.3
occluded = 0.1
rebuilt = 0.4
redrawn = 0.4
empty = 0.1
drawn = 4
samples = 8
batch = 4
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training") / "small.toml"
    path.write_text(SMALL)
    return path


def command(config: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elakit.world.train", "--config", str(config), "--out", str(out), *more],
        capture_output=True,
        text=True,
    )


def test_one_command_trains_every_part_and_a_second_call_has_nothing_left_to_do(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    first = command(config, out)
    assert first.returncode == 0, first.stderr
    assert "dB on 256 new scenes" in first.stdout
    pipe = StableDiffusionPipeline.from_pretrained(out / "model", local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red car", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert (out / "judge" / "model.safetensors").exists()
    assert list(out.glob("samples-*.png"))
    before = torch.load(out / "denoiser.pt", weights_only=True)
    again = command(config, out)
    assert again.returncode == 0, again.stderr
    after = torch.load(out / "denoiser.pt", weights_only=True)
    assert before["step"] == after["step"] == 2
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])


def test_latents_have_unit_variance_and_the_decoder_alone_is_polished(config: Path, tmp_path: Path) -> None:
    from elakit.world.training.autoencoder import train_autoencoder, train_decoder
    from elakit.world.training.data import compose_scenes

    settings = read_config(config)
    scenes, where = compose_scenes(settings.world, settings.vae.scenes, seed=1), torch.device("cpu")
    vae = train_autoencoder(settings, scenes, tmp_path, where)
    with torch.no_grad():
        latents = vae.encode(scenes.batch(np.arange(16))).latents * vae.config.scaling_factor
    assert latents.std() == pytest.approx(1, rel=1e-3)
    polished = train_decoder(settings, scenes, tmp_path, where)
    same = dict(vae.encoder.named_parameters())
    assert all(torch.equal(value, same[name]) for name, value in polished.encoder.named_parameters())
    other = dict(vae.decoder.named_parameters())
    assert any(not torch.equal(value, other[name]) for name, value in polished.decoder.named_parameters())


def test_a_stage_that_does_not_exist_is_refused(config: Path, tmp_path: Path) -> None:
    wrong = command(config, tmp_path, "--stage", "unet")
    assert wrong.returncode == 2
    assert "decoder" in wrong.stderr
