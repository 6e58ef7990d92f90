"""Detectors of real images: small random models of the real classes, and stub networks that find a red rectangle.

Random weights find rubbish, so what a model *answers* is mostly replaced here by a known answer, or by one read off the
very pixels the processor made (`bright_box`): if boxes then land on the painted rectangle, the whole way there and back
(padding, resizing, scaling) is right, whatever the family's conventions.
"""

from __future__ import annotations

import json
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTProcessor,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTImageProcessorPil,
)

from elakit.errors import ModelError, PromptError, SettingError
from elakit.judge.detectors import (
    ClipSegSegmenter,
    GroundingDinoDetector,
    OwlDetector,
    Sam,
    load_detector,
    mark_coinciding,
)
from elakit.judge.things import Thing
from elakit.world.vocabulary import COLORS

WORDS = ("cat", "dog", "frog", "polar", "bear")
BOX_FAMILIES = ("owlvit", "owlv2", "grounding-dino")
FAMILIES = (*BOX_FAMILIES, "clipseg")
SIZES = [(200, 100), (60, 150), (64, 64)]  # width, height

# --- small models of the real classes -----------------------------------------------------------------------


def clip_tokenizer():
    # Start and end come last: the text encoders read the position of the largest token, and 0 is padding.
    letters = [c + end for c in string.ascii_lowercase + string.punctuation for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<pad>", *letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", model_max_length=32)


def bert_tokenizer():
    # The model parts phrases by the numbers these tokens have in BERT's vocabulary.
    places = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    places |= dict(enumerate(WORDS, 200)) | {300: "hedge", 301: "##hog"}
    return BertTokenizer(vocab={places.get(i, f"[unused{i}]"): i for i in range(1030)})


TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_TEXT = TEXT | {
    "vocab_size": 119, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 117, "eos_token_id": 118,
}  # fmt: skip
VISION = TEXT | {"image_size": 64, "patch_size": 16}


def owl(kind):
    config, model, processor, images = {
        "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor, OwlViTImageProcessorPil),
        "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor, Owlv2ImageProcessorPil),
    }[kind]
    network = model(config(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16))
    network.box_head.dense2.weight.data.mul_(0.01)  # else many boxes are thinner than a pixel
    return network, processor(images(size={"height": 64, "width": 64}), clip_tokenizer())


def grounding_dino():
    backbone = SwinConfig(
        image_size=64, embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, out_indices=[2, 3, 4]
    )
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=BertConfig(vocab_size=1030, **TEXT), d_model=32, num_queries=8,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, max_text_len=32,
    )  # fmt: skip
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 192})
    return GroundingDinoForObjectDetection(config), GroundingDinoProcessor(images, bert_tokenizer())


def clipseg():
    config = CLIPSegConfig(
        text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16, extract_layers=[0], reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=8,
    )  # fmt: skip
    images = ViTImageProcessorPil(size={"height": 64, "width": 64})
    return CLIPSegForImageSegmentation(config), CLIPSegProcessor(images, clip_tokenizer())


def segment_anything():
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "window_size": 2, "num_pos_feats": 8, "global_attn_indexes": [0], "mlp_dim": 16,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 64, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    }  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    images = SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    return SamModel(config), SamProcessor(images)


BUILDERS = {
    "owlvit": lambda: owl("owlvit"), "owlv2": lambda: owl("owlv2"), "grounding-dino": grounding_dino,
    "clipseg": clipseg, "sam": segment_anything,
}  # fmt: skip
ADAPTERS = {
    "owlvit": OwlDetector, "owlv2": OwlDetector, "grounding-dino": GroundingDinoDetector, "clipseg": ClipSegSegmenter,
}  # fmt: skip


def build(kind):
    torch.manual_seed(0)
    return BUILDERS[kind]()


@pytest.fixture(scope="module")
def parts():
    """Model and processor of every family, built once."""
    return {kind: build(kind) for kind in BUILDERS}


@pytest.fixture
def answering(parts, monkeypatch):
    """A detector whose model returns the result of a function of its inputs."""

    def make(kind, answer, **options):
        model, processor = parts[kind]
        monkeypatch.setattr(model, "forward", lambda **inputs: answer(inputs))
        return ADAPTERS[kind](model, processor, **options)

    return make


# --- known answers ------------------------------------------------------------------------------------------


def logit(p):
    return torch.logit(torch.as_tensor(p, dtype=torch.float32))


def boxes_answer(kind, boxes, scores):
    """Output of a model: boxes as (x, y, width, height) shares, scores (box, noun) for nouns of one token each."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    if kind == "grounding-dino":  # [CLS] cat . dog . ... [SEP]
        tokens = torch.zeros(len(scores), 32)
        tokens[:, 1 : 2 * scores.shape[1] : 2] = scores
        scores = tokens
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    return lambda _: SimpleNamespace(logits=logit(scores)[None], pred_boxes=boxes[None])


def painted(size, box, color="red"):
    image = Image.new("RGB", size, "black")
    left, top, right, bottom = box
    image.paste(color, (left, top, right, bottom))
    return image


def bright(pixels):
    """Where a processed image (3, y, x) is red, whatever its mean and deviation."""
    red = pixels[0] - pixels[1]
    return red >= (red.min() + red.max()) / 2  # an image that is red all over is bright all over


def bright_box(kind):
    """Stub network: one box around the red pixels of its input, with a high score for the first noun."""

    def answer(inputs):
        seen = bright(inputs["pixel_values"][0]).nonzero().float()
        size = torch.tensor(inputs["pixel_values"].shape[-2:])
        low, high = seen.amin(0) / size, (seen.amax(0) + 1) / size
        (y, x), (height, width) = (low + high) / 2, high - low
        return boxes_answer(kind, [[x, y, width, height]], [[0.9]])(inputs)

    return answer


# --- what every detector keeps to -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_a_random_model_returns_valid_things(parts, kind, size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    lenient = {"text_threshold": 0.0} if kind == "grounding-dino" else {}
    detector = ADAPTERS[kind](*parts[kind], threshold=0.0, **lenient)
    things = detector(image, ["Cat", "frogs"])
    assert things, "nothing to check"
    for thing in things:
        assert thing.noun in ("cat", "frogs")
        assert thing.mask.dtype == bool
        assert thing.mask.shape == (size[1], size[0])
        assert 0 <= thing.score <= 1
        assert thing.color in COLORS
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
    assert [t.score for t in things] == sorted((t.score for t in things), reverse=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_half_precision_and_other_image_modes(kind):
    model, processor = build(kind)
    detector = ADAPTERS[kind](model.to(torch.bfloat16), processor, threshold=0.0)
    assert detector(Image.new("LA", (40, 30), (128, 255)), ["cat"])[0].mask.shape == (30, 40)


@pytest.mark.parametrize("kind", FAMILIES)
def test_training_mode_and_gradients_are_off(parts, kind):
    model, processor = parts[kind]
    model.train()
    detector = ADAPTERS[kind](model, processor)
    assert not model.training
    first, again = (detector(painted((64, 64), (8, 8, 40, 40)), ["cat"]) for _ in range(2))
    assert [(t.score, t.box) for t in first] == [(t.score, t.box) for t in again]


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_nouns_no_work(answering, kind):
    def never(_):
        raise AssertionError("the model was asked")

    assert answering(kind, never)(Image.new("RGB", (32, 32)), []) == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_found(parts, kind):
    detector = ADAPTERS[kind](*parts[kind], threshold=1.0)
    assert detector(Image.new("RGB", (70, 40)), ["cat", "dog"]) == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_spellings_of_one_noun_are_queried_once(answering, kind):
    asked = []

    def answer(inputs):
        asked.append(inputs["input_ids"])
        if kind == "clipseg":
            return SimpleNamespace(logits=torch.full((2, 64, 64), -9.0))
        return boxes_answer(kind, np.zeros((0, 4)), np.zeros((0, 2)))(inputs)

    detector = answering(kind, answer)
    detector(Image.new("RGB", (32, 32)), ["cat", "CAT", " cat ", "dog"])
    detector(Image.new("RGB", (32, 32)), ["cat", "dog"])
    assert torch.equal(*asked)


@pytest.mark.parametrize("nouns", ["cat", ["cat", ""], ["..."]])
def test_values_that_are_no_list_of_nouns_are_refused(parts, nouns):
    with pytest.raises(PromptError, match="noun"):
        GroundingDinoDetector(*parts["grounding-dino"])(Image.new("RGB", (32, 32)), nouns)


# --- boxes land where the thing is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # An image of 200 x 100 and the box x .3 +- .1, y .25 +- .12: shares of the image, ...
        ("owlvit", (40, 13, 80, 37)),
        ("grounding-dino", (40, 13, 80, 37)),
        # ... but in OWLv2 of the square of 200 that the image is padded to.
        ("owlv2", (40, 26, 80, 74)),
    ],
)
def test_box_worked_by_hand(answering, kind, expected):
    detector = answering(kind, boxes_answer(kind, [[0.3, 0.25, 0.2, 0.24]], [[0.8]]))
    things = detector(Image.new("RGB", (200, 100)), ["cat"])
    assert [(t.noun, t.box) for t in things] == [("cat", expected)]
    assert things[0].score == pytest.approx(0.8, abs=1e-6)
    assert things[0].mask.sum() == (expected[2] - expected[0]) * (expected[3] - expected[1])


@pytest.mark.parametrize("kind", BOX_FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_box_lies_on_the_painted_rectangle(parts, kind, data):
    width, height = data.draw(st.sampled_from(SIZES), "size")
    left = data.draw(st.integers(0, width // 2))
    top = data.draw(st.integers(0, height // 2))
    right = data.draw(st.integers(left + width // 4, width))
    bottom = data.draw(st.integers(top + height // 4, height))
    model, processor = parts[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", lambda **inputs: bright_box(kind)(inputs))
        (thing,) = ADAPTERS[kind](model, processor)(painted((width, height), (left, top, right, bottom)), ["cat"])
    # The model sees a side of 64 to 192 pixels, so a box is right to about two of its pixels.
    np.testing.assert_allclose(thing.box, (left, top, right, bottom), atol=2 * max(width, height) / 64)
    assert thing.color == "red"


@pytest.mark.parametrize("kind", BOX_FAMILIES)
def test_boxes_are_cut_at_the_image_and_those_outside_are_dropped(answering, kind):
    answer = boxes_answer(kind, [[0.0, 0.0, 0.5, 0.5], [0.5, 1.5, 0.2, 0.2]], [[0.8], [0.9]])
    (thing,) = answering(kind, answer)(Image.new("RGB", (80, 80)), ["cat"])
    assert thing.box == (0, 0, 20, 20)


def test_boxes_in_the_padding_of_owlv2_are_dropped(answering):
    answer = boxes_answer("owlv2", [[0.5, 0.75, 0.4, 0.3]], [[0.9]])  # below an image twice as wide as high
    assert answering("owlv2", answer)(Image.new("RGB", (200, 100)), ["cat"]) == []


# --- suppression --------------------------------------------------------------------------------------------------

# The first two overlap with an IoU of .36 / .44 = .82, the third lies apart.
CROWD = [[0.3, 0.3, 0.4, 0.4], [0.32, 0.32, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]]


@pytest.mark.parametrize("kind", BOX_FAMILIES)
def test_the_box_with_the_higher_score_is_kept(answering, kind):
    image = Image.new("RGB", (100, 100))
    answer = boxes_answer(kind, CROWD, [[0.6], [0.9], [0.5]])
    assert [t.box for t in answering(kind, answer)(image, ["cat"])] == [(12, 12, 52, 52), (70, 70, 90, 90)]
    assert len(answering(kind, answer, nms=0.95)(image, ["cat"])) == 3


@pytest.mark.parametrize("kind", BOX_FAMILIES)
def test_boxes_of_different_nouns_do_not_suppress_each_other(answering, kind):
    answer = boxes_answer(kind, CROWD, [[0.6, 0.01], [0.01, 0.9], [0.5, 0.01]])
    things = answering(kind, answer)(Image.new("RGB", (100, 100)), ["cat", "dog"])
    assert [t.noun for t in things] == ["dog", "cat", "cat"]
    assert not any(t.mixed_with for t in things)  # .82 is below the threshold


@pytest.mark.parametrize("kind", BOX_FAMILIES)
def test_threshold(answering, kind):
    answer = boxes_answer(kind, CROWD, [[0.35], [0.1], [0.8]])
    things = answering(kind, answer, threshold=0.3)(Image.new("RGB", (100, 100)), ["cat"])
    np.testing.assert_allclose([t.score for t in things], [0.8, 0.35], rtol=1e-5)


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
def test_owl_assigns_a_box_to_its_best_noun_and_marks_coinciding_boxes(answering, kind):
    answer = boxes_answer(kind, [[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4]], [[0.7, 0.6], [0.2, 0.5]])
    things = answering(kind, answer)(Image.new("RGB", (50, 50)), ["cat", "dog"])
    assert [(t.noun, t.mixed_with) for t in things] == [("cat", ("dog",)), ("dog", ("cat",))]
    np.testing.assert_allclose([t.score for t in things], [0.7, 0.5], rtol=1e-5)


# --- Grounding DINO's tokens ---------------------------------------------------------------------------------------


def tokens_answer(tokens):
    """One box; `tokens` are the scores of the text's tokens, from [CLS] on."""
    scores = torch.zeros(1, 1, 32)
    scores[0, 0, : len(tokens)] = torch.tensor(tokens)
    return lambda _: SimpleNamespace(logits=logit(scores), pred_boxes=torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]))


def named(answering, tokens, nouns, **options):
    things = answering("grounding-dino", tokens_answer(tokens), **options)(Image.new("RGB", (40, 40)), nouns)
    return {t.noun: round(t.score, 3) for t in things}


def test_the_score_of_a_noun_is_the_mean_over_its_tokens(answering):
    # [CLS] polar bear . cat . [SEP]
    assert named(answering, [0, 0.2, 0.6, 0, 0.05, 0, 0], ["polar bear", "cat"]) == {"polar bear": 0.4}
    # [CLS] hedge ##hog . cat . [SEP]
    assert named(answering, [0, 0.1, 0.35, 0, 0.5, 0, 0], ["hedgehog", "cat"]) == {"cat": 0.5}


def test_a_box_of_two_nouns_is_a_mixture(answering):
    detector = answering("grounding-dino", tokens_answer([0, 0.5, 0, 0.28, 0, 0]))
    things = detector(Image.new("RGB", (40, 40)), ["cat", "frog"])
    assert [(t.noun, t.mixed_with) for t in things] == [("cat", ("frog",)), ("frog", ("cat",))]
    assert named(answering, [0, 0.5, 0, 0.28, 0, 0], ["cat", "frog"], text_threshold=0.4) == {"cat": 0.5}


def test_full_stops_within_a_noun_do_not_shift_the_next(answering):
    # [CLS] [UNK] [UNK] . cat . [SEP]
    assert named(answering, [0, 0, 0, 0, 0.9, 0, 0], ["st. bernard", "cat"]) == {"cat": 0.9}


def test_too_many_nouns_for_one_text_are_refused(parts):
    with pytest.raises(SettingError, match="37 tokens; the detector reads at most 32"):
        GroundingDinoDetector(*parts["grounding-dino"])(
            Image.new("RGB", (32, 32)), [f"cat {'dog ' * n}" for n in range(7)]
        )


# --- CLIPSeg -------------------------------------------------------------------------------------------------------


def test_each_component_of_the_strongest_noun_is_a_thing(answering):
    heat = torch.full((2, 64, 64), 0.05)
    heat[0, :, :16] = 0.9  # cat on the left quarter, ...
    heat[0, 8:16, 40:56] = 0.8  # and another one; ...
    heat[1, :, :16] = 0.7  # the dog is weaker there,
    heat[1, 40:, 40:] = 0.6  # and on its own at the lower right;
    heat[1, 20:22, 30:32] = 0.9  # and a speck.
    detector = answering("clipseg", lambda _: SimpleNamespace(logits=logit(heat)))
    things = detector(painted((64, 64), (40, 40, 64, 64), "white"), ["cat", "dog"])
    assert [(t.noun, t.box) for t in things] == [
        ("cat", (0, 0, 16, 64)), ("cat", (40, 8, 56, 16)), ("dog", (40, 40, 64, 64)),
    ]  # fmt: skip
    np.testing.assert_allclose([t.score for t in things], [0.9, 0.8, 0.6], rtol=1e-5)
    assert things[2].color == "white"
    assert sum(t.mask.astype(int) for t in things).max() == 1
    speck = answering("clipseg", lambda _: SimpleNamespace(logits=logit(heat)), least_area=0.0005)
    assert (30, 20, 32, 22) in [t.box for t in speck(Image.new("RGB", (64, 64)), ["cat", "dog"])]


@pytest.mark.parametrize("nouns", ["cat", []])
def test_scores_of_a_single_text_or_of_nothing_are_refused(answering, nouns):
    with pytest.raises(PromptError, match=r"give a list of one or more nouns"):
        answering("clipseg", lambda _: None).scores(Image.new("RGB", (32, 32)), nouns)


@pytest.mark.parametrize("size", SIZES)
def test_clipseg_masks_lie_on_the_painted_rectangle(answering, size):
    box = (size[0] // 8, size[1] // 4, size[0] // 2, size[1] // 2)
    detector = answering("clipseg", lambda x: SimpleNamespace(logits=18.0 * bright(x["pixel_values"][0])[None] - 9))
    (thing,) = detector(painted(size, box), ["cat"])
    np.testing.assert_allclose(thing.box, box, atol=2 * max(size) / 64)


# --- SAM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_random_sam_returns_one_mask_per_box(parts, size):
    masks = Sam(*parts["sam"])(Image.new("RGB", size), [(0, 0, 20, 20), (5, 5, 40, 30)])
    assert masks.dtype == bool
    assert masks.shape == (2, size[1], size[0])
    assert Sam(*parts["sam"])(Image.new("RGB", size), []).shape == (0, size[1], size[0])


def sam_that_sees_red(parts, monkeypatch, seen):
    def answer(**inputs):
        assert not inputs["multimask_output"]
        seen.append(inputs["input_boxes"])
        red = bright(inputs["pixel_values"][0]).float() * 2 - 1
        return SimpleNamespace(pred_masks=red.expand(1, inputs["input_boxes"].shape[1], 1, 64, 64))

    monkeypatch.setattr(parts["sam"][0], "forward", answer)
    return Sam(*parts["sam"])


@pytest.mark.parametrize("kind", BOX_FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_sam_refines_boxes_to_masks(parts, answering, monkeypatch, kind, size):
    seen = []
    sam = sam_that_sees_red(parts, monkeypatch, seen)
    rectangle = (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4)
    scale = max(size) if kind == "owlv2" else None
    share = [0.5 * size[0] / (scale or size[0]), 0.5 * size[1] / (scale or size[1])]
    answer = boxes_answer(kind, [[*share, 2 * share[0], 2 * share[1]]], [[0.8]])  # the whole image
    (thing,) = answering(kind, answer, masks=sam)(painted(size, rectangle), ["cat"])
    np.testing.assert_allclose(thing.box, rectangle, atol=2 * max(size) / 64)
    assert thing.color == "red"  # the color of the whole box would be black
    # SAM is given boxes in its own pixels: the longer side of 64.
    np.testing.assert_allclose(seen[0][0, 0], [0, 0, *(np.array(size) * 64 / max(size))], atol=0.5)
    (plain,) = answering(kind, answer)(painted(size, rectangle), ["cat"])
    assert plain.mask.all()
    assert plain.color == "black"


def test_the_box_is_the_mask_where_sam_finds_nothing(parts, answering, monkeypatch):
    monkeypatch.setattr(
        parts["sam"][0], "forward", lambda **_: SimpleNamespace(pred_masks=-torch.ones(1, 1, 1, 16, 16))
    )
    answer = boxes_answer("owlvit", [[0.5, 0.5, 0.5, 0.5]], [[0.8]])
    (thing,) = answering("owlvit", answer, masks=Sam(*parts["sam"]))(Image.new("RGB", (40, 40)), ["cat"])
    assert thing.box == (10, 10, 30, 30)


def test_a_mixture_is_kept_when_sam_segments_its_two_boxes_differently(parts, answering, monkeypatch):
    halves = torch.ones(1, 2, 1, 16, 16)
    halves[0, 0, 0, :, :8] = halves[0, 1, 0, :, 8:] = -1
    monkeypatch.setattr(parts["sam"][0], "forward", lambda **_: SimpleNamespace(pred_masks=halves))
    answer = boxes_answer("owlvit", [[0.5, 0.5, 0.5, 0.5]] * 2, [[0.8, 0.1], [0.1, 0.7]])
    cat, dog = answering("owlvit", answer, masks=Sam(*parts["sam"]))(Image.new("RGB", (40, 40)), ["cat", "dog"])
    assert not (cat.mask & dog.mask).any()
    assert (cat.mixed_with, dog.mixed_with) == (("dog",), ("cat",))


def test_the_color_of_a_large_thing_is_that_of_most_pixels(answering):
    stripes = np.zeros((1000, 1000, 3), np.uint8)
    stripes[:, ::5] = (255, 255, 255)
    stripes[:, 1::5] = stripes[:, 2::5] = stripes[:, 3::5] = (200, 20, 30)
    (thing,) = answering("owlvit", boxes_answer("owlvit", [[0.5, 0.5, 1, 1]], [[0.8]]))(
        Image.fromarray(stripes), ["cat"]
    )
    assert thing.color == "red"


# --- coinciding things ------------------------------------------------------------------------------------------------


def thing(noun, left, top, right, bottom, mixed_with=()):
    mask = np.zeros((100, 100), bool)
    mask[top:bottom, left:right] = True
    return Thing(noun, mask, 0.5, None, mixed_with)


def mixtures(*things, **options):
    return [t.mixed_with for t in mark_coinciding(things, **options)]


def test_coinciding_boxes_of_two_nouns_are_a_mixture():
    cat, dog = thing("cat", 0, 0, 100, 95), thing("dog", 0, 0, 100, 100)  # IoU .95
    frog, far = thing("frog", 0, 0, 100, 80), thing("bear", 0, 90, 10, 100)
    assert mixtures(cat, dog, frog, far) == [("dog",), ("cat",), (), ()]
    # .8 / .95 = .84 and .8 / 1
    assert mixtures(cat, dog, frog, far, iou=0.79) == [("dog", "frog"), ("cat", "frog"), ("cat", "dog"), ()]


def test_an_iou_equal_to_the_threshold_is_no_mixture():
    assert mixtures(thing("cat", 0, 0, 100, 90), thing("dog", 0, 0, 100, 100)) == [(), ()]


def test_two_things_of_one_noun_are_no_mixture_and_earlier_marks_are_kept():
    assert mixtures(thing("cat", 0, 0, 9, 9), thing("cat", 0, 0, 9, 9)) == [(), ()]
    assert mixtures(thing("cat", 0, 0, 9, 9, ("frog",)), thing("dog", 0, 0, 9, 9)) == [("frog", "dog"), ("cat",)]
    assert mixtures(thing("cat", 0, 0, 0, 0), thing("dog", 0, 0, 0, 0)) == [(), ()]  # empty boxes do not coincide
    assert mixtures() == []


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    base = tmp_path_factory.mktemp("detectors")
    for kind, (model, processor) in parts.items():
        model.save_pretrained(base / kind)
        processor.save_pretrained(base / kind)
    return base


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_detector_is_loaded_and_finds_the_same(parts, folders, kind):
    lenient = {"text_threshold": 0.0} if kind == "grounding-dino" else {}
    loaded = load_detector(folders / kind, device="cpu", threshold=0.01, **lenient)
    assert isinstance(loaded, ADAPTERS[kind])
    image = painted((90, 60), (20, 10, 50, 40))
    before, after = (d(image, ["cat"]) for d in (ADAPTERS[kind](*parts[kind], threshold=0.01, **lenient), loaded))
    assert before
    assert [t.box for t in before] == [t.box for t in after]
    np.testing.assert_allclose([t.score for t in before], [t.score for t in after], rtol=1e-4)


def test_loading_with_sam(folders):
    detector = load_detector(str(folders / "owlv2"), sam=folders / "sam", device="cpu", threshold=0.0)
    assert isinstance(detector.masks, Sam)
    assert detector(Image.new("RGB", (50, 40)), ["cat"])[0].mask.shape == (40, 50)


def test_unsupported_models_are_refused_with_the_supported_families(parts, folders):
    for refused in (
        lambda: load_detector(folders / "sam"),
        lambda: load_detector(folders / "owlvit", sam=folders / "clipseg"),
        lambda: OwlDetector(*parts["clipseg"]),
        lambda: GroundingDinoDetector(*parts["owlv2"]),
        lambda: ClipSegSegmenter(*parts["sam"]),
        lambda: Sam(*parts["owlvit"]),
        lambda: OwlDetector("owlv2", None),
    ):
        with pytest.raises(ModelError):
            refused()
    with pytest.raises(ModelError, match=r"'sam'.*Supported: owlvit, owlv2, grounding-dino, clipseg"):
        load_detector(folders / "sam")
    with pytest.raises(ModelError, match=r"Supported: owlvit, owlv2\."):
        OwlDetector(*parts["clipseg"])


def test_errors_of_missing_parts_name_the_next_step(folders, tmp_path, parts):
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        load_detector("owlv2")
    with pytest.raises(ModelError, match=r"SAM 'vit-base' is neither .* such as 'facebook/sam-vit-base'"):
        load_detector(folders / "owlv2", sam="vit-base")
    with pytest.raises(ModelError, match=r"no-such/detector.*hf download no-such/detector"):
        load_detector("no-such/detector")
    with pytest.raises(ModelError, match="has no model_type"):
        load_detector(tmp_path)  # no config
    model, processor = parts["owlvit"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_detector(tmp_path)  # no processor
    processor.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        load_detector(tmp_path)  # weights that may contain code


def test_code_in_a_checkpoint_is_not_run(parts, tmp_path):
    for part in parts["owlv2"]:
        part.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    for name in ("config.json", "processor_config.json"):
        table = json.loads((tmp_path / name).read_text())
        classes = ("AutoConfig", "AutoModelForZeroShotObjectDetection", "AutoProcessor", "AutoImageProcessor")
        table["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        (tmp_path / name).write_text(json.dumps(table))
    assert type(load_detector(tmp_path, device="cpu").model) is Owlv2ForObjectDetection


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"nms": -0.1}, "nms is -0.1"),
        ({"query": "a cat"}, "query is 'a cat'"),
        ({"text_threshold": 0.3}, "has no option 'text_threshold'. Choose from threshold, nms, query"),
        ({"device": "gpu"}, "device='gpu' is not a device"),
    ],
)
def test_settings_out_of_range_are_refused(folders, options, message):
    with pytest.raises(SettingError, match=message):
        load_detector(folders / "owlvit", **options)


def test_options_of_other_families_are_refused(parts, folders):
    with pytest.raises(SettingError, match="text_threshold is 2"):
        GroundingDinoDetector(*parts["grounding-dino"], text_threshold=2)
    with pytest.raises(SettingError, match="least_area is 7"):
        ClipSegSegmenter(*parts["clipseg"], least_area=7)
    with pytest.raises(SettingError, match="CLIPSeg predicts masks itself"):
        load_detector(folders / "clipseg", sam=folders / "sam")
    with pytest.raises(SettingError, match=r"iou is 1\.1"):
        mark_coinciding([], iou=1.1)
