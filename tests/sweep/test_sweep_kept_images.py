"""Kept images: stored with the sweep, scored by other models, and exported for other benchmarks."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from elakit.errors import ModelError, OutputError, SettingError
from elakit.prompt import parse
from elakit.sweep import SCORERS, Unit, export_images, plan, report, run, score, store, table
from elakit.sweep.scorers import Sample, load_scorer

OTHERS = ("red car", "blue clock", "apple", "chair", "bear")
PROMPTS = [f"a [{animal}] and a [{other}]" for animal in ("cat", "dog", "frog", "bird") for other in OTHERS]
PARSED = {text: parse(text, tiny_pipeline()) for text in PROMPTS}
TEXTS = [PARSED[text].text for text in PROMPTS]


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 48, 3), np.uint8))


def pretend(unit: Unit, keep_images: bool = False) -> list[dict[str, Any]]:
    """Rows and noise images that depend on the unit alone."""
    rows = []
    for seed in unit.seeds:
        buffer = io.BytesIO()
        picture(int(unit.key, 16) % 2**32 + seed).save(buffer, "PNG")
        parsed = json.dumps(PARSED[unit.prompt].to_dict())
        row = {**unit.labels(), "seed": seed, "success": seed == 1, "parsed": parsed, "blocked": False}
        rows.append(row | ({"png": buffer.getvalue()} if keep_images else {}))
    return rows


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kept sweep of 20 prompts, 2 methods and 2 seeds."""
    folder = tmp_path_factory.mktemp("kept")
    with ThreadPoolExecutor(1) as pool:
        run(plan(PROMPTS, [1, 3]), folder, pool, generate=pretend, keep_images=True)
    return folder


# --- small models of the real classes -----------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_clip(folder: Path) -> str:
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz?[]" for end in ("", "</w>")]
    tokens = ["<pad>", *letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], pad_token="<pad>", model_max_length=64
    )
    text = SIZES | {
        "vocab_size": len(tokens), "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 16}, projection_dim=16)
    ).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def save_blip(folder: Path, kind: Any) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "yes", "no", "?", "a", "and", "cat", "red", "car"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, bos_token="[DEC]")
    text = SIZES | {
        "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 40, "bos_token_id": 5,
        "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "projection_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 16}, projection_dim=16)
    kind(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def vqa_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_blip(tmp_path_factory.mktemp("vqa"), BlipForQuestionAnswering)


@pytest.fixture
def sample() -> Sample:
    return Sample(image=picture(1), prompt=PARSED["a [cat] and a [red car]"], plain=picture(2), path="image.png")


# --- storing ------------------------------------------------------------------------------------------------


def test_every_image_is_stored_as_png_and_kept_on_resuming(kept: Path, tmp_path: Path) -> None:
    found = table(kept)
    assert len(found) == 80
    for row in found.head(5).itertuples():
        expected = np.asarray(picture(int(row.key, 16) % 2**32 + row.seed))
        np.testing.assert_array_equal(np.asarray(Image.open(store.image_path(kept, row.key, row.seed))), expected)
    units = plan(PROMPTS[:2], [1])
    with ThreadPoolExecutor(1) as pool:
        assert run(units, tmp_path, pool, generate=pretend).generated == 4
        # images that were not kept, or were deleted, are generated again
        assert run(units, tmp_path, pool, generate=pretend, keep_images=True).generated == 4
        store.image_path(tmp_path, units[0].key, 1).unlink()
        assert run(units, tmp_path, pool, generate=pretend, keep_images=True).generated == 1
        assert run(units, tmp_path, pool, generate=pretend, keep_images=True).generated == 0


# --- exporting ----------------------------------------------------------------------------------------------


def compbench_prompts(folder: Path) -> list[tuple[str, int]]:
    """Prompts and numbers that T2I-CompBench's scripts read from the file names in ``samples/``."""
    names = sorted(os.listdir(folder / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    return [(name.split("_")[0], int(name.split("_")[-1].split(".")[0])) for name in names]


def test_a_script_in_the_layout_of_t2i_compbench_reads_all_images(kept: Path, tmp_path: Path) -> None:
    out = export_images(kept, tmp_path / "export")
    assert sorted(path.name for path in out.iterdir()) == ["ela", "export.json", "plain"]
    for method in ("plain", "ela"):
        read = compbench_prompts(out / method)
        assert [number for _, number in read] == list(range(40))
        assert {prompt for prompt, _ in read} == set(TEXTS)


def test_geneval_2_and_t2v_metrics_find_prompts_and_images(kept: Path, tmp_path: Path) -> None:
    out = export_images(kept, tmp_path / "export") / "ela"
    found = table(kept)
    for name, seed in (("geneval2.json", 1), ("geneval2-seed3.json", 3)):
        paths = json.loads((out / name).read_text())
        assert set(paths) == set(TEXTS)
        row = found[(found["prompt"] == PROMPTS[0]) & (found["method"] == "ela") & (found["seed"] == seed)].iloc[0]
        stored = store.image_path(kept, row["key"], seed).read_bytes()
        assert Path(paths[TEXTS[0]]).read_bytes() == stored
    pairs = json.loads((out / "t2v_metrics.json").read_text())
    assert len(pairs) == 40
    assert all(len(pair["images"]) == len(pair["texts"]) == 1 and Path(pair["images"][0]).is_file() for pair in pairs)
    rows = list(csv.DictReader((out / "images.csv").open()))
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    # a second file of this name, in another format, is an error for the image folders of Hugging Face
    assert [path.name for path in out.glob("metadata.*")] == ["metadata.jsonl"]
    assert [row["file_name"] for row in rows] == [line["file_name"] for line in lines]
    assert {(row["method"], row["seed"]) for row in rows} == {("ela", "1"), ("ela", "3")}


def test_an_export_replaces_an_export_and_nothing_else(kept: Path, tmp_path: Path) -> None:
    export_images(kept, tmp_path / "export")
    export_images(kept, tmp_path / "export")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not an export"):
        export_images(kept, tmp_path / "thesis")
    with ThreadPoolExecutor(1) as pool:
        run(plan(PROMPTS[:1], [1]), tmp_path / "unkept", pool, generate=pretend)
    for action in (export_images, lambda folder: score(folder, "clip")):
        with pytest.raises(OutputError, match="--keep-images"):
            action(tmp_path / "unkept")


# --- scoring ------------------------------------------------------------------------------------------------


def test_two_scorers_join_their_columns_to_the_table_and_the_report(
    kept: Path, clip_model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dino = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES, image_size=32, patch_size=16)).save_pretrained(dino)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(dino)
    calls: list[tuple[int, int]] = []
    scorers = [f"clip={clip_model}", f"dino={dino}"]
    found = score(kept, scorers, device="cpu", on_progress=lambda *done: calls.append(done))
    try:
        assert calls[-1] == (160, 160)
        assert found[["clip_full", "clip_min", "dino_distance"]].notna().all(axis=None)
        assert (found["clip_min"].abs() <= 1).all()
        plain = found["method"] == "plain"
        assert found.loc[plain, "dino_distance"].abs().max() < 1e-5
        assert (found.loc[~plain, "dino_distance"] > 1e-5).all()
        pd.testing.assert_frame_equal(table(kept), found)
        calls.clear()
        score(kept, scorers, device="cpu", on_progress=lambda *done: calls.append(done), load=never)
        assert not calls  # everything is stored
        page = report.write(kept, kept / "report.html")
        text = page.with_suffix(".md").read_text()
        assert "## Scores" in text
        assert f"{found.loc[plain, 'clip_full'].mean():.3f}" in text
    finally:
        for path in (kept / "scores").iterdir():
            path.unlink()


def never(*_: Any) -> Any:
    raise AssertionError("nothing is left to score")


def test_clip_scores_are_cosines_of_the_models_embeddings(clip_model: str, sample: Sample) -> None:
    values = load_scorer("clip", clip_model, "cpu")(sample)
    model, processor = CLIPModel.from_pretrained(clip_model), CLIPProcessor.from_pretrained(clip_model)
    texts = ["a cat and a red car", "a cat", "a red car"]
    inputs = processor(text=texts, images=sample.image, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = (model(**inputs).logits_per_image[0] / model.logit_scale.exp()).tolist()
    # padding comes after the token that is read, so it has no effect
    texts_of = [entity.text for entity in sample.prompt.entities]
    assert texts_of == ["cat", "red car"] or texts_of == texts[1:]
    if texts_of == texts[1:]:
        assert values["clip_min"] == pytest.approx(min(expected[1:]), abs=1e-5)
    assert values["clip_full"] == pytest.approx(expected[0], abs=1e-5)


def test_blip_vqa_multiplies_the_answers_for_the_entities(vqa_model: str, sample: Sample) -> None:
    both = load_scorer("blip-vqa", vqa_model, "cpu")(sample)["blip_vqa"]
    single = []
    for text in ("a [cat]", "a [red car]"):
        alone = Sample(image=sample.image, prompt=parse(text, tiny_pipeline()), plain=None, path="")
        single.append(load_scorer("blip-vqa", vqa_model, "cpu")(alone)["blip_vqa"])
    assert both == pytest.approx(single[0] * single[1], rel=1e-4)
    assert 0 < both < 1


def test_a_caption_is_compared_with_the_prompt(
    clip_model: str, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_blip(tmp_path / "blip", BlipForConditionalGeneration)
    values = load_scorer("caption", f"{model}|{clip_model}", "cpu")(sample)
    assert isinstance(values["caption"], str)
    assert -1 <= values["caption_similarity"] <= 1
    monkeypatch.setattr(BlipProcessor, "decode", lambda *_, **__: sample.prompt.text)
    assert load_scorer("caption", f"{model}|{clip_model}", "cpu")(sample)["caption_similarity"] == pytest.approx(1)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages lpips and t2v_metrics."""

    class Distance:
        def __init__(self, net: str) -> None:
            assert net == "alex"

        def to(self, _: Any) -> Distance:
            return self

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == (1, 3, 48, 48)
            assert -1 <= float(a.min()) < float(a.max()) <= 1
            return (a - b).abs().mean()

    class VQAScore:
        def __init__(self, model: str, device: str) -> None:
            assert model == "clip-flant5-xxl"

        def __call__(self, images: list[str], texts: list[str]) -> torch.Tensor:
            assert (images, texts) == (["image.png"], ["a cat and a red car"])
            return torch.tensor([[0.25]])

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Distance))
    monkeypatch.setitem(sys.modules, "t2v_metrics", types.SimpleNamespace(VQAScore=VQAScore))


@pytest.mark.usefixtures("packages")
def test_scorers_of_other_packages_get_what_they_expect(sample: Sample) -> None:
    difference = np.abs(np.asarray(sample.image, float) - np.asarray(sample.plain, float)).mean() / 127.5
    assert load_scorer("lpips", device="cpu")(sample)["lpips"] == pytest.approx(difference, rel=1e-4)
    assert load_scorer("vqascore", device="cpu")(sample) == {"vqascore": 0.25}
    alone = Sample(image=sample.image, prompt=sample.prompt, plain=None, path="")
    assert load_scorer("lpips", device="cpu")(alone) == {"lpips": None}


def test_a_detector_gives_the_columns_of_a_verdict(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elakit.sweep.scorers.load_detector", lambda name, device: lambda image, nouns: [])
    values = load_scorer("detector", "org/owl", "cpu")(sample)
    assert values["detector_success"] is False
    assert values["detector_neglect"] is True
    assert values["detector_present"] == 0


def test_what_cannot_score_is_refused_with_the_next_step(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="No scorer is given"):
        score(kept, [])
    with pytest.raises(SettingError, match=r"no scorer 'fid'.*clip"):
        score(kept, "fid")
    with pytest.raises(SettingError, match="detector=MODEL"):
        score(kept, "detector")
    with pytest.raises(ModelError, match="cannot be loaded as CLIPModel"):
        score(kept, f"clip={tmp_path}")
    for name, module in (("lpips", "lpips"), ("vqascore", "t2v_metrics")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModelError, match=f"{module}, which is not installed.*pip install"):
            score(kept, name)
    assert all(kind.summary for kind in SCORERS.values())
