"""The built-in model can be trained again by one command, and a training that was stopped goes on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import nn
from training_line import fit, fit_together

from elakit.errors import SettingError
from elakit.world.scenes import World
from elakit.world.tokenizer import train_tokenizer
from elakit.world.training.config import Config, read_config

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
decay_from = 0.5
noise = 0.1
pull = 1e-4
edges = 1.0
features = 0.1
nested = 0.5
equivariant = 0.5
kept = 10.0

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
first_scenes = 4
chunk = 4
reuse = 1
close_ups = 8
samples = 12
batch = 4
learning_rate = 1e-3
warmup = 1
decay_from = 0.85
average = 0.9
min_snr = 5.0
least_weight = 0.5
drop_text = 0.1
neutral_end = 0.6
outlines = 0.05
compiled = false

[judge]
channels = [8, 8, 8, 8]
scenes = 12
mixtures = 0.2
occluded = 0.1
spoiled = 0.3
rebuilt = 0.4
redrawn = 0.4
empty = 0.1
drawn = 4
unfinished = 4
labels = ["judge-labels/seeds-100"]
labeled = 2
samples = 8
batch = 4
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training") / "small.toml"
    path.write_text(SMALL)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of the training's command in this process, which has imported torch and diffusers already."""
    from elakit.cli_options import one_line_errors
    from elakit.world import train

    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as ended, one_line_errors("train"):
        typer.run(train.main)
    return int(ended.value.code or 0)


def test_one_command_trains_every_part_and_a_second_call_has_nothing_left_to_do(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    words = ["--config", str(config), "--out", str(out)]
    first = subprocess.run([sys.executable, "-m", "elakit.world.train", *words], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "dB on 256 new scenes" in first.stdout
    pipe = StableDiffusionPipeline.from_pretrained(out / "model", local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red car", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert (out / "judge" / "model.safetensors").exists()
    assert list(out.glob("samples-*.png"))
    assert [path.name for path in sorted((out / "scenes").glob("*.pt"))] == ["0000.pt", "0001.pt"]
    close = torch.load(out / "close-ups" / "scenes" / "0000.pt", weights_only=True)
    assert close["latents"].shape == (4, 4, 4, 4)  # 32 pixels; whole scenes have 64
    assert torch.load(out / "close-ups" / "denoiser.pt", weights_only=True)["step"] == 1
    before = torch.load(out / "denoiser.pt", weights_only=True)
    assert call(monkeypatch, *words) == 0
    after = torch.load(out / "denoiser.pt", weights_only=True)
    assert before["step"] == after["step"] == 3
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


def test_an_autoencoder_that_grows_keeps_the_latents_it_started_from(config: Path, tmp_path: Path) -> None:
    from elakit.world.training.autoencoder import train_autoencoder
    from elakit.world.training.data import compose_scenes

    settings = read_config(config)
    scenes, where = compose_scenes(settings.world, settings.vae.scenes, seed=1), torch.device("cpu")
    small = train_autoencoder(settings, scenes, tmp_path / "small", where)
    images = scenes.batch(np.arange(16))

    def moved(kept: float) -> float:
        wider = dataclasses.replace(settings.vae, latent_channels=6, kept=kept, samples=400, learning_rate=1e-2)
        out = tmp_path / f"kept-{kept}"
        grown = train_autoencoder(
            dataclasses.replace(settings, vae=wider), scenes, out, where, start=tmp_path / "small" / "vae"
        )
        assert grown.config.scaling_factor == small.config.scaling_factor
        with torch.no_grad():
            latents, before = grown.encode(images).latents, small.encode(images).latents
        assert latents.shape[1] == 6
        return float((latents[:, :4] - before).pow(2).mean() / before.var())

    # an autoencoder that may change its latents does, and one that must keep them does not
    assert moved(100.0) < 0.3 * moved(0.0)


def test_latents_of_half_the_resolution_belong_to_the_smaller_image() -> None:
    from elakit.world.training.autoencoder import _transformed

    images = torch.rand(2, 3, 16, 16)
    smaller = nn.functional.avg_pool2d(images, 2)
    mirrored = {tuple(axes): smaller.flip(axes) for axes in ([], [2], [3], [2, 3])}
    found = set()
    for seed in range(30):
        torch.manual_seed(seed)
        latents, wanted = _transformed(images.clone(), images)
        assert torch.equal(latents, wanted)
        found |= {axes for axes, each in mirrored.items() if torch.equal(wanted, each)}
    assert found == set(mirrored)


def test_whole_scenes_are_trained_from_the_weights_of_the_close_ups(config: Path, tmp_path: Path) -> None:
    from elakit.world.training.autoencoder import train_autoencoder
    from elakit.world.training.data import compose_scenes
    from elakit.world.training.denoiser import train_denoiser

    settings = read_config(config)
    settings = dataclasses.replace(settings, denoiser=dataclasses.replace(settings.denoiser, learning_rate=1e-12))
    scenes, where = compose_scenes(settings.world, settings.vae.scenes, seed=1), torch.device("cpu")
    train_autoencoder(settings, scenes, tmp_path, where)
    train_denoiser(settings, tmp_path, where)
    path = tmp_path / "close-ups" / "denoiser.pt"
    # with a learning rate of almost zero, whole scenes change nothing, so that they end where the close-ups did
    state = torch.load(path, weights_only=True)
    for values in state["average"].values():
        values.copy_(0.5 * values)
    torch.save(state, path)
    (tmp_path / "denoiser.pt").unlink()
    train_denoiser(settings, tmp_path, where)
    ended = torch.load(tmp_path / "denoiser.pt", weights_only=True)["model"]
    assert all(
        torch.allclose(ended[name].float(), value.float(), atol=1e-4) for name, value in state["average"].items()
    )


def test_two_processes_train_together_as_one_with_both_batches(tmp_path: Path) -> None:
    from elakit.world.train import free_port

    torch.multiprocessing.spawn(fit_together, (free_port(), tmp_path), nprocs=2)
    alone = fit(tmp_path / "alone").state_dict()
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            assert torch.allclose(together[name], value, atol=1e-5), (rank, name)


def test_a_checkpoint_with_other_batches_is_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.raises(SettingError, match="with 4 images per step, but this run has 2 images"):
        fit(tmp_path, batch=2)


def test_a_stage_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "--out", str(tmp_path), "--stage", "unet") == 2
    assert "decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "absent.toml"], "Cannot read the training configuration absent.toml"),
        (["--device", "gpu"], "device='gpu' is not a device; use 'cpu'"),
        (["--device", "cuda:99"], "no usable CUDA device with that index"),
        (["--stage", "denoiser"], "vae, which does not exist. Run --stage vae first, or --stage all."),
        (["--stage", "judge,vae"], "model, which does not exist. Run --stage denoiser first, or --stage all."),
        (["--start", "absent"], "--start absent: there is no vae/config.json"),
        (["--out", __file__], "is a file. Choose a folder."),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line_before_scenes_are_composed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    from elakit.world import train

    def composed(*_: Any) -> None:
        raise AssertionError("the training has begun")

    for begins in ("cached_crowds", "compose_scenes"):
        monkeypatch.setattr(train, begins, composed)
    assert call(monkeypatch, "--config", str(config), "--out", str(tmp_path / "out"), *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: ")
    assert message in line


def test_each_process_on_cuda_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from elakit.world import train

    monkeypatch.setattr(train, "device_named", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train.process_devices("cuda", 1) == (torch.device("cuda"),)
    assert train.process_devices("cuda", 2) == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert train.process_devices("cpu", 2) == (torch.device("cpu"),) * 2
    for device, processes, owned in (("cuda", 3, 2), ("cuda:1", 2, 1), ("mps", 2, 1)):
        with pytest.raises(
            SettingError, match=f"each process needs a GPU of its own, and --device {device} gives {owned}"
        ):
            train.process_devices(device, processes)


def test_linear_layers_computed_together_give_the_values_and_gradients_of_the_layers() -> None:
    from elakit.world.training import linear_runs

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0, 0, 1, 0),
        num_decoder_blocks=(1, 1, 1, 0),
        latent_channels=4,
    ).double()
    images = torch.rand(1, 3, 160, 160, dtype=torch.float64) * 2 - 1
    given = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    gradients, values = [], []
    for encode, decode in (
        (lambda x: vae.encode(x).latents, lambda z: vae.decode(z).sample),
        (lambda x: linear_runs.encode(vae, x), lambda z: linear_runs.decode(vae, z)),
    ):
        vae.zero_grad()
        # the border differs, and how far inward depends on the layers behind; the middle is the same
        latents = encode(images)
        middle, inner = latents[..., 6:-6, 6:-6], decode(given)[..., 4:-4, 4:-4]
        values.append((middle, inner))
        (middle.pow(2).sum() + inner.pow(2).sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in vae.named_parameters()})
    for a, b in zip(*values, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-6, atol=1e-8), name


def test_a_grown_model_starts_as_the_smaller_one(config: Path) -> None:
    from elakit.world.training import autoencoder, denoiser

    settings = read_config(config)
    torch.manual_seed(0)
    small = autoencoder.build(settings)
    wider = dataclasses.replace(settings.vae, latent_channels=6, decoder_blocks=(2, 1, 0, 0))
    large = autoencoder.build(dataclasses.replace(settings, vae=wider))
    autoencoder.grow(large, small)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = large.encode(images).latents
        assert torch.equal(latents[:, :4], small.encode(images).latents)
        assert latents.shape[1] == 6
        assert torch.allclose(large.decode(latents).sample, small.decode(latents[:, :4]).sample, atol=1e-6)

    tokenizer = train_tokenizer(settings.text.vocabulary, settings.text.positions)

    def parts(config: Config) -> nn.ModuleDict:
        unet, text = denoiser.build_unet(config, config.text.width), denoiser.build_text_encoder(config, tokenizer)
        return nn.ModuleDict({"text": text, "unet": unet})

    old, new = parts(settings), parts(dataclasses.replace(settings, vae=wider))
    pipe = denoiser.assemble(old, small, tokenizer, denoiser.build_scheduler())
    denoiser.grow(new, tokenizer, pipe)
    noisy, states = torch.randn(1, 6, 8, 8), torch.randn(1, 24, 32)
    with torch.no_grad():
        grown = new["unet"](noisy, 500, states).sample
        assert torch.allclose(grown[:, :4], old["unet"](noisy[:, :4], 500, states).sample, atol=1e-5)
        assert not grown[:, 4:].any()
    # the meaning of a word stays with the word when the new vocabulary gives it another number
    renumbered = train_tokenizer(settings.text.vocabulary - 50, settings.text.positions)
    fewer = parts(settings)
    fewer["text"] = denoiser.build_text_encoder(settings, renumbered)
    denoiser.grow(fewer, renumbered, pipe)
    meanings = [
        part["text"].state_dict()["embeddings.token_embedding.weight"][words.get_vocab()["cat</w>"]]
        for part, words in ((old, tokenizer), (fewer, renumbered))
    ]
    assert torch.equal(*meanings)
    other = dataclasses.replace(settings, denoiser=dataclasses.replace(settings.denoiser, channels=(16, 32, 48)))
    with pytest.raises(SettingError, match="architecture"):
        denoiser.grow(parts(other), tokenizer, pipe)


def test_a_judge_with_a_new_output_starts_as_the_earlier_one() -> None:
    from elakit.judge.segmenter import CLASSES, Segmenter
    from elakit.world.training.judge import grow

    torch.manual_seed(0)
    old, new = Segmenter((4, 8, 8), outputs=CLASSES + 1).eval(), Segmenter((4, 8, 8)).eval()
    grow(new, old.state_dict())
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(new(images)[:, : CLASSES + 1], old(images))
        assert not new(images)[:, CLASSES + 1].any()
    with pytest.raises(SettingError, match=r"stem.*shape.*channels"):
        grow(Segmenter((8, 8, 8)), old.state_dict())


def test_a_long_training_composes_new_scenes_as_it_goes(config: Path, tmp_path: Path) -> None:
    from elakit.world.training.encoded import GrowingScenes

    settings = read_config(config)
    longer = dataclasses.replace(settings.denoiser, scenes=10, first_scenes=3, chunk=2, reuse=5)
    scenes = GrowingScenes(dataclasses.replace(settings, denoiser=longer), tmp_path, None, None, torch.device("cpu"))
    # 3 are rounded up to two chunks; a new chunk is due as soon as every scene has been seen five times
    assert [scenes.count(seen) for seen in (0, 20, 25, 30, 49, 1_000)] == [4, 4, 6, 6, 10, 10]


def test_scenes_that_other_processes_compose_ahead_are_the_same(config: Path, tmp_path: Path) -> None:
    from elakit.world.training import autoencoder
    from elakit.world.training.encoded import Encoded, GrowingScenes

    settings = read_config(config)
    longer = dataclasses.replace(settings.denoiser, scenes=12, first_scenes=4, chunk=4, reuse=1)
    settings = dataclasses.replace(settings, denoiser=longer)
    torch.manual_seed(0)
    vae = autoencoder.build(settings).eval()
    tokenizer = train_tokenizer(settings.text.vocabulary, settings.text.positions)

    def batches(folder: str, workers: int) -> list[Encoded]:
        scenes = GrowingScenes(settings, tmp_path / folder, vae, tokenizer, torch.device("cpu"), workers)
        torch.manual_seed(1)
        return [scenes.batch(seen, 8) for seen in (0, 12)]

    for alone, ahead in zip(batches("alone", 0), batches("ahead", 2), strict=True):
        for name, value in vars(alone).items():
            assert torch.equal(getattr(ahead, name), value), name
    assert len(list((tmp_path / "ahead" / "scenes").glob("*.pt"))) == 3


def test_kept_scenes_of_other_settings_are_composed_again(config: Path, tmp_path: Path) -> None:
    from elakit.world.training import autoencoder
    from elakit.world.training.encoded import Encoded, GrowingScenes

    settings = read_config(config)
    settings = dataclasses.replace(settings, denoiser=dataclasses.replace(settings.denoiser, scenes=4, first_scenes=4))
    torch.manual_seed(0)
    vae = autoencoder.build(settings).eval()
    tokenizer = train_tokenizer(settings.text.vocabulary, settings.text.positions)

    def batch(used: Config, folder: str, model: Any) -> Encoded:
        torch.manual_seed(1)
        return GrowingScenes(used, tmp_path / folder, model, tokenizer, torch.device("cpu")).batch(0, 8)

    def same(one: Encoded, other: Encoded) -> bool:
        return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())

    first = batch(settings, "kept", vae)
    written = (tmp_path / "kept" / "scenes" / "0000.pt").stat().st_mtime_ns
    assert same(batch(settings, "kept", vae), first)
    assert (tmp_path / "kept" / "scenes" / "0000.pt").stat().st_mtime_ns == written  # read, not made again
    changed = dataclasses.replace(settings, world=dataclasses.replace(settings.world, natural=1.0, shadow=0.9))
    assert not same(batch(changed, "kept", vae), first)
    assert same(batch(changed, "kept", vae), batch(changed, "new", vae))
    other = autoencoder.build(settings).eval()
    assert same(batch(changed, "kept", other), batch(changed, "newer", other))


def test_crowds_of_other_settings_are_composed_again(tmp_path: Path) -> None:
    from elakit.world.training.data import cached_crowds

    world, file = World(artists=("noto",)), tmp_path / "crowds.npz"
    cached_crowds(dataclasses.replace(world, mirrored=1.0), 2, 0, file)
    assert np.array_equal(
        cached_crowds(world, 2, 0, file).images, cached_crowds(world, 2, 0, tmp_path / "new.npz").images
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 8\n", "widht = 8\n", r"\[vae\] of .*: unknown setting widht; missing setting width\. The settings"),
        ("noise = 0.1", "noise = '0.1'", r"\[vae\] of .*: noise is '0.1'; give a number\."),
        ("batch = 4", "batch = true", r"\[vae\] of .*: batch is True; give a whole number\."),
        ("size = 64", "size = 0", r"\[world\] of .*: World\(size=0\): must be a whole number, 1 or more"),
    ],
)
def test_a_wrong_setting_is_named_with_its_section_and_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    (tmp_path / "wrong.toml").write_text(SMALL.replace(old, new, 1))
    with pytest.raises(SettingError, match=message):
        read_config(tmp_path / "wrong.toml")


@pytest.mark.parametrize("least", [-0.1, 0.6])
def test_a_lower_bound_that_would_make_the_weights_jump_is_refused(least: float) -> None:
    with pytest.raises(SettingError, match=f"least_weight is {least}; give a number from 0"):
        dataclasses.replace(read_config().denoiser, least_weight=least)
