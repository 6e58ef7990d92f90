"""Zero-shot detectors and segmenters from Hugging Face transformers, for images that picture-world did not generate.

picture-world has a built-in judge. The detectors are for images of all other models, and for photographs. Each detector
is a callable that takes an image and nouns and returns things, as the built-in judge does. Each follows the
post-processing that the model's authors published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from skimage.measure import label as components
from torch.nn import functional as F
from transformers import AutoProcessor, PreTrainedConfig

from elakit.errors import ModelError, PromptError, SettingError
from elakit.judge.color import name_color
from elakit.judge.things import Detector, Thing
from elakit.models import HUB_ID, device_named, first_line
from elakit.numbering import number_of

__all__ = ["ClipSegSegmenter", "GroundingDinoDetector", "OwlDetector", "Sam", "load_detector", "mark_coinciding"]

_COLOR_PIXELS = 4096  # sampled from each thing to name its color; all of a megapixel would take gigabytes of memory


@dataclass(frozen=True, eq=False)
class Sam:
    """Segment Anything (Kirillov et al., ICCV 2023), which predicts a mask for each box.

    Parameters
    ----------
    model : transformers.SamModel
        Segment Anything model, for example ``facebook/sam-vit-base``.
    processor : transformers.SamProcessor

    Raises
    ------
    ModelError
        The model belongs to another family.
    """

    model: Any
    processor: Any

    def __post_init__(self) -> None:
        _check_model(self.model, "sam")

    @torch.no_grad()
    def __call__(self, image: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
        """Segment the object in each box.

        Parameters
        ----------
        image : PIL.Image.Image
        boxes : sequence of (left, top, right, bottom)
            In pixels.

        Returns
        -------
        ndarray, bool, (box, y, x)
        """
        rgb = image.convert("RGB")
        if not len(boxes):
            return np.zeros((0, rgb.height, rgb.width), bool)
        inputs = self.processor(rgb, input_boxes=[[[float(x) for x in box] for box in boxes]], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        # A box is rarely ambiguous, so one mask per box is predicted, as the authors recommend.
        outputs = self.model(**_ready(inputs, self.model), multimask_output=False)
        return self.processor.post_process_masks(outputs.pred_masks.float().cpu(), *sizes)[0][:, 0].numpy()


@dataclass(frozen=True, eq=False)
class OwlDetector:
    """OWL-ViT or OWLv2 detector (Minderer et al., 2022 and 2023); each box gets the noun with the highest score.

    Parameters
    ----------
    model : transformers.OwlViTForObjectDetection or transformers.Owlv2ForObjectDetection
    processor : transformers.OwlViTProcessor or transformers.Owlv2Processor
    threshold : float
        Score that a box must exceed to be kept; the default is the same as in transformers.
    nms : float
        IoU threshold of non-maximum suppression among the boxes of one noun.
    query : str
        Template of the text query for a noun; ``{noun}`` is replaced by the noun.
    masks : Sam, optional
        Model that predicts the mask of the thing in each box. By default, the mask of a thing is the whole box, and the
        color of the thing is the most frequent color in the box.

    Raises
    ------
    ModelError
        The model belongs to another family.
    SettingError
        A setting is outside its range.
    """

    model: Any
    processor: Any
    threshold: float = 0.1
    nms: float = 0.5
    query: str = "a photo of a {noun}"
    masks: Sam | None = None

    def __post_init__(self) -> None:
        _check_model(self.model, "owlvit", "owlv2")
        _check_shares(threshold=self.threshold, nms=self.nms)
        _check_query(self.query)

    @torch.no_grad()
    def __call__(self, image: Image.Image, nouns: Sequence[str]) -> list[Thing]:
        """Things in the image that match one of the nouns, in descending order of score.

        Raises
        ------
        PromptError
            `nouns` is a single string, or one of the nouns contains no letter or digit.
        """
        asked = _distinct(nouns)
        if not asked:
            return []
        rgb = image.convert("RGB")
        texts = [self.query.replace("{noun}", noun) for noun in asked]
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            images=rgb, text=[texts], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        outputs = self.model(**_ready(inputs, self.model))
        # Single precision from here on, because half precision cannot represent every pixel of a large image.
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        # It scales OWLv2's boxes by the image padded to a square and OWL-ViT's by the image itself.
        found = self.processor.post_process_grounded_object_detection(
            outputs, threshold=self.threshold, target_sizes=[(rgb.height, rgb.width)]
        )[0]
        owners = [asked[i] for i in found["labels"].tolist()]
        return _things(rgb, owners, found["scores"], found["boxes"], self.nms, self.masks)


@dataclass(frozen=True, eq=False)
class GroundingDinoDetector:
    """Grounding DINO detector (Liu et al., ECCV 2024), which may assign several nouns to one box.

    The model reads all nouns in one text, such as "cat. frog.".

    Parameters
    ----------
    model : transformers.GroundingDinoForObjectDetection
    processor : transformers.GroundingDinoProcessor
    threshold : float
        A box is kept if the score of at least one token of the text exceeds this value.
    text_threshold : float
        A kept box is assigned to a noun if the mean score of the noun's tokens exceeds this value. This mean is the
        score of the thing.
    nms : float
        IoU threshold of non-maximum suppression among the boxes of one noun.
    masks : Sam, optional
        Model that predicts the mask of the thing in each box. By default, the mask of a thing is the whole box, and the
        color of the thing is the most frequent color in the box.

    Raises
    ------
    ModelError
        The model belongs to another family.
    SettingError
        A setting is outside its range.
    """

    model: Any
    processor: Any
    threshold: float = 0.3
    text_threshold: float = 0.25
    nms: float = 0.5
    masks: Sam | None = None

    def __post_init__(self) -> None:
        _check_model(self.model, "grounding-dino")
        _check_shares(threshold=self.threshold, text_threshold=self.text_threshold, nms=self.nms)

    @torch.no_grad()
    def __call__(self, image: Image.Image, nouns: Sequence[str]) -> list[Thing]:
        """Things in the image that match one of the nouns, in descending order of score.

        Raises
        ------
        PromptError
            `nouns` is a single string, or one of the nouns contains no letter or digit.
        SettingError
            All nouns together have more tokens than the model reads.
        """
        asked = _distinct(nouns)
        if not asked:
            return []
        rgb = image.convert("RGB")
        # The model separates phrases at full stops and question marks, so a phrase may not contain any.
        text = " ".join(re.sub(r"[.?]", " ", noun) + "." for noun in asked)
        inputs = self.processor(images=rgb, text=text, return_tensors="pt")
        spans = self._spans(inputs["input_ids"][0].tolist())
        if len(inputs["input_ids"][0]) > self.model.config.max_text_len:
            remedy = "Shorten the noun." if len(asked) == 1 else "Divide the nouns among several calls."
            raise SettingError(
                f"nouns: {number_of(len(asked), 'noun')} with {len(inputs['input_ids'][0])} tokens; the detector reads "
                f"at most {self.model.config.max_text_len}. {remedy}"
            )
        outputs = self.model(**_ready(inputs, self.model))
        tokens = outputs.logits[0].float().sigmoid()  # (box, token)
        kept = tokens.amax(1) > self.threshold
        scores = torch.stack([tokens[kept][:, span].mean(1) for span in spans], 1)  # (box, noun)
        rows, columns = (scores > self.text_threshold).nonzero(as_tuple=True)
        x, y, width, height = outputs.pred_boxes[0].float()[kept][rows].unbind(1)
        corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
        corners = corners * corners.new_tensor([rgb.width, rgb.height, rgb.width, rgb.height])
        owners = [asked[i] for i in columns.tolist()]
        return _things(rgb, owners, scores[rows, columns], corners, self.nms, self.masks)

    def _spans(self, ids: list[int]) -> list[list[int]]:
        """Positions of each noun's tokens in a text such as "cat. frog.", one list per noun.

        `ids` has the token ids of the text. A full stop ends each noun, and special tokens belong to no noun.
        """
        tokenizer = self.processor.tokenizer
        stop = tokenizer.convert_tokens_to_ids(".")
        spans: list[list[int]] = [[]]
        for position, token in enumerate(ids):
            if token == stop:
                spans.append([])
            elif token not in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
                spans[-1].append(position)
        return spans[:-1]


@dataclass(frozen=True, eq=False)
class ClipSegSegmenter:
    """CLIPSeg segmenter (Lüddecke and Ecker, CVPR 2022): a thing is a connected component of pixels of one noun.

    Each pixel is assigned to the noun with the highest score at this pixel. The score of a thing is the mean score of
    the noun over the thing's pixels. Things are disjoint, so this segmenter never reports hybrids.

    Parameters
    ----------
    model : transformers.CLIPSegForImageSegmentation
    processor : transformers.CLIPSegProcessor
    threshold : float
        Score that a pixel must exceed to be assigned to a noun; all other pixels are background.
    least_area : float
        Smallest share of the image, 0 to 1, that a component must cover to count as a thing.
    query : str
        Template of the text query for a noun; ``{noun}`` is replaced by the noun.

    Raises
    ------
    ModelError
        The model belongs to another family.
    SettingError
        A setting is outside its range.
    """

    model: Any
    processor: Any
    threshold: float = 0.4
    least_area: float = 0.01
    query: str = "a photo of a {noun}"

    def __post_init__(self) -> None:
        _check_model(self.model, "clipseg")
        _check_shares(threshold=self.threshold, least_area=self.least_area)
        _check_query(self.query)

    @torch.no_grad()
    def __call__(self, image: Image.Image, nouns: Sequence[str]) -> list[Thing]:
        """Things in the image that match one of the nouns, in descending order of score.

        Raises
        ------
        PromptError
            `nouns` is a single string, or one of the nouns contains no letter or digit.
        """
        asked = _distinct(nouns)
        if not asked:
            return []
        rgb = image.convert("RGB")
        scores = self.scores(rgb, asked)
        strongest = scores.argmax(0)
        things = []
        for i, noun in enumerate(asked):
            labeled, count = components(
                (strongest == i) & (scores[i] > self.threshold), return_num=True, connectivity=2
            )
            areas = np.bincount(labeled.ravel(), minlength=count + 1) / labeled.size
            for component in 1 + np.flatnonzero(areas[1:] >= self.least_area):
                mask = labeled == component
                things.append(Thing(noun=noun, mask=mask, score=float(scores[i][mask].mean()), color=_color(rgb, mask)))
        return sorted(things, key=lambda thing: -thing.score)

    @torch.no_grad()
    def scores(self, image: Image.Image, nouns: Sequence[str]) -> np.ndarray:
        """Score of each noun at each pixel.

        Parameters
        ----------
        image : PIL.Image.Image
        nouns : sequence of str

        Returns
        -------
        ndarray, float32 in [0, 1], (noun, y, x)
            Scores; y and x are the pixels of the image.

        Raises
        ------
        PromptError
            `nouns` is a single string or an empty list.
        """
        if isinstance(nouns, str) or not nouns:
            raise PromptError(f"nouns={nouns!r}: give a list of one or more nouns, such as ['cat', 'lion'].")
        texts = [self.query.replace("{noun}", noun) for noun in nouns]
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=texts, images=image, padding=True, max_length=length, truncation=True, return_tensors="pt"
        )
        inputs = _ready(inputs, self.model)
        inputs["pixel_values"] = inputs["pixel_values"].expand(len(texts), -1, -1, -1)
        logits = self.model(**inputs).logits.float()
        logits = logits.reshape(len(texts), 1, *logits.shape[-2:])
        full = F.interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=False)
        return full[:, 0].sigmoid().cpu().numpy()


# model_type of a checkpoint's config -> the detector class, and the model class of transformers.
_FAMILIES: dict[str, tuple[Any, str]] = {
    "owlvit": (OwlDetector, "OwlViTForObjectDetection"),
    "owlv2": (OwlDetector, "Owlv2ForObjectDetection"),
    "grounding-dino": (GroundingDinoDetector, "GroundingDinoForObjectDetection"),
    "clipseg": (ClipSegSegmenter, "CLIPSegForImageSegmentation"),
}


def load_detector(
    name: str | Path,
    *,
    sam: str | Path | Sam | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Detector:
    """Load a detector for images of all models other than picture-world, and for photographs.

    Weights must be safetensors, and code in a checkpoint is never executed.

    Parameters
    ----------
    name : str or pathlib.Path
        A folder written by ``save_pretrained`` (model and processor), or a hub id. Recommended:
        ``google/owlv2-base-patch16-ensemble`` and ``IDEA-Research/grounding-dino-tiny`` for detection,
        ``CIDAS/clipseg-rd64-refined`` for segmentation.
    sam : str, pathlib.Path or Sam, optional
        Model that refines the boxes of OWL and Grounding DINO to masks, such as ``facebook/sam-vit-base``; recommended
        if colors matter. By default the mask of a thing is its whole box.
    device : str or torch.device, optional
        By default CUDA if available, else the CPU.
    dtype : torch.dtype
        Data type of the weights.
    **options
        Options of `OwlDetector`, `GroundingDinoDetector` or `ClipSegSegmenter`, such as ``threshold``.

    Returns
    -------
    Detector

    Raises
    ------
    ModelError
        The model cannot be loaded or belongs to an unsupported family.
    SettingError
        The family has no such option, a value is outside its range, the device does not exist, or `sam` is given for
        CLIPSeg.

    Examples
    --------
    >>> detector = load_detector("google/owlv2-base-patch16-ensemble", threshold=0.2)  # doctest: +SKIP
    >>> detector(image, ["cat", "frog"])  # doctest: +SKIP
    [Thing(noun='cat', ...)]
    >>> load_detector("owlv2")
    Traceback (most recent call last):
    ...
    elakit.errors.ModelError: Detector 'owlv2' is neither a folder nor a hub id ...
    """
    chosen = device_named(device)
    kind = _model_type(name)
    if kind not in _FAMILIES:
        raise _unsupported(f"Detector {str(name)!r}", kind)
    adapter, class_name = _FAMILIES[kind]
    settings = [field.name for field in fields(adapter) if field.name not in ("model", "processor", "masks")]
    for option in options:
        if option not in settings:
            raise SettingError(f"Detector {str(name)!r} has no option {option!r}. Choose from {', '.join(settings)}.")
    if sam is not None and adapter is ClipSegSegmenter:
        raise SettingError(
            "sam is given, but CLIPSeg predicts masks itself. Leave sam out, or load a detector of boxes, such as "
            "'google/owlv2-base-patch16-ensemble'."
        )
    if sam is not None and not isinstance(sam, Sam):
        example = "facebook/sam-vit-base"
        if (sam_kind := _model_type(sam, example, "SAM")) != "sam":
            raise ModelError(f"sam is {str(sam)!r}, a {sam_kind!r} model; give a SAM such as {example!r}.")
        sam = Sam(*_load(sam, "SamModel", chosen, dtype, "SAM"))
    if sam is not None:
        options["masks"] = sam
    return adapter(*_load(name, class_name, chosen, dtype), **options)


def mark_coinciding(things: Sequence[Thing], iou: float = 0.9) -> list[Thing]:
    """Mark things of different nouns as parts of one hybrid if their boxes coincide.

    Parameters
    ----------
    things : sequence of Thing
    iou : float
        Intersection over union above which two boxes coincide, 0 to 1.

    Returns
    -------
    list of Thing
        Copies of the things, in the same order. If the box of a thing coincides with boxes of other nouns, these nouns
        are added to the thing's ``mixed_with``.

    Raises
    ------
    SettingError
        ``iou`` is outside [0, 1].

    References
    ----------
    .. [1] Chen et al., "A Cat Is A Cat (Not A Dog!): Unraveling Information Mix-ups in Text-to-Image Encoders through
       Causal Analysis and Embedding Optimization", 2024: two boxes that overlap by more than 90% are a mixture.

    Examples
    --------
    A cat and a dog with the same box:

    >>> mask = np.ones((4, 4), bool)
    >>> [t.mixed_with for t in mark_coinciding([Thing("cat", mask, 0.8, "gray"), Thing("dog", mask, 0.7, "gray")])]
    [('dog',), ('cat',)]
    """
    _check_shares(iou=iou)
    overlaps = _ious(np.array([thing.box for thing in things], float).reshape(-1, 4))
    marked = []
    for thing, row in zip(things, overlaps, strict=True):
        others = [other.noun for other, overlap in zip(things, row, strict=True) if overlap > iou]
        names = dict.fromkeys([*thing.mixed_with, *others])
        marked.append(replace(thing, mixed_with=tuple(noun for noun in names if noun != thing.noun)))
    return marked


def _things(
    rgb: Image.Image, nouns: list[str], scores: torch.Tensor, corners: torch.Tensor, nms: float, sam: Sam | None
) -> list[Thing]:
    """Things in the boxes that remain after non-maximum suppression, in descending order of score.

    Things of different nouns whose boxes coincide are marked as hybrids.

    Parameters
    ----------
    rgb : PIL.Image.Image
        Image in RGB.
    nouns : list of str
        Noun of each box.
    scores : Tensor, (box,)
        Score of each box for its noun.
    corners : Tensor, (box, 4)
        (left, top, right, bottom) of each box, in pixels.
    nms : float
        IoU threshold of non-maximum suppression among the boxes of one noun.
    sam : Sam or None
        Model that predicts the mask of the thing in each box. If None, the mask is the whole box.
    """
    sides = [rgb.width, rgb.height, rgb.width, rgb.height]
    boxes = np.clip(np.rint(corners.cpu().numpy()), 0, sides).astype(int)
    confidence = scores.cpu().numpy()
    things = []
    for i in _suppress(boxes, confidence, nouns, nms):
        left, top, right, bottom = boxes[i]
        mask = np.zeros((rgb.height, rgb.width), bool)
        mask[top:bottom, left:right] = True
        things.append(Thing(noun=nouns[i], mask=mask, score=float(confidence[i]), color=None))
    # Before masks are refined, because mixtures are defined by the detector's boxes.
    things = mark_coinciding(things)
    if sam is not None:
        refined = sam(rgb, [thing.box for thing in things])
        things = [replace(t, mask=mask) if mask.any() else t for t, mask in zip(things, refined, strict=True)]
    return [replace(thing, color=_color(rgb, thing.mask)) for thing in things]


def _suppress(boxes: np.ndarray, scores: np.ndarray, nouns: list[str], iou: float) -> list[int]:
    """Indices of the boxes that non-maximum suppression keeps, in descending order of score.

    `boxes` has one row (left, top, right, bottom) per box; `scores` and `nouns` have one value per box. An empty box is
    dropped. A box is also dropped if its intersection over union with a kept box of the same noun exceeds `iou`.
    """
    visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    order = [int(i) for i in np.argsort(-scores, kind="stable") if visible[i]]
    overlaps = _ious(boxes.astype(float))
    kept: list[int] = []
    for i in order:
        if not any(nouns[i] == nouns[k] and overlaps[i, k] > iou for k in kept):
            kept.append(i)
    return kept


def _ious(boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes, as an array (n, n).

    `boxes` is an array (n, 4) with a row (left, top, right, bottom) for each box. Two empty boxes have the value 0.
    """
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1)
    union = areas[:, None] + areas[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _color(rgb: Image.Image, mask: np.ndarray) -> str | None:
    pixels = np.asarray(rgb)[mask]
    if len(pixels) > _COLOR_PIXELS:
        pixels = pixels[np.random.default_rng(0).choice(len(pixels), _COLOR_PIXELS, replace=False)]
    return name_color(pixels)


def _distinct(nouns: Sequence[str]) -> list[str]:
    """Nouns in lower case without repetitions, in the order of their first occurrence."""
    if isinstance(nouns, str):
        raise PromptError(f"nouns is the string {nouns!r}; give a list, such as [{nouns!r}].")
    names = list(dict.fromkeys(" ".join(noun.lower().split()) for noun in nouns))
    if any(not re.search(r"\w", name) for name in names):
        raise PromptError(f"nouns are {list(nouns)!r}; each needs at least one letter or digit.")
    return names


def _ready(inputs: Mapping[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Inputs of a model, moved to the model's device; floating-point inputs are converted to the model's dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def _check_model(model: Any, *kinds: str) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in kinds:
        raise _unsupported(type(model).__name__, kind, kinds)
    model.eval()


def _check_shares(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise SettingError(f"{name} is {value!r}; it must be a number from 0 to 1.")


def _check_query(query: str) -> None:
    if "{noun}" not in query:
        raise SettingError(f"query is {query!r}; it must contain '{{noun}}', which is replaced by the noun.")


def _model_type(name: str | Path, example: str = "google/owlv2-base-patch16-ensemble", what: str = "Detector") -> str:
    """Family (``model_type``) of a checkpoint, read from its config before any weights are downloaded.

    `name` is a folder or a hub id. Every family is accepted here; the callers refuse the families that they do not
    support. A `ModelError` is raised if the model cannot be found or read. The error message names the kind of model,
    `what`. If `name` is neither a folder nor a hub id, the message also gives `example`, a valid hub id.
    """
    if not Path(name).is_dir() and not (isinstance(name, str) and HUB_ID.fullmatch(name)):
        raise ModelError(f"{what} {str(name)!r} is neither a folder nor a hub id such as {example!r}.")
    try:
        kind = PreTrainedConfig.get_config_dict(str(name))[0].get("model_type")
    except (OSError, ValueError) as error:
        raise _unavailable(name, first_line(error), what) from error
    if not isinstance(kind, str):
        raise _unavailable(name, "its config.json is missing or has no model_type.", what)
    return kind


def _load(
    name: str | Path, class_name: str, device: torch.device, dtype: torch.dtype, what: str = "Detector"
) -> tuple[Any, Any]:
    try:
        processor = AutoProcessor.from_pretrained(str(name), trust_remote_code=False)
        model = getattr(transformers, class_name).from_pretrained(str(name), use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, ImportError) as error:
        # Damaged and incomplete checkpoints raise many kinds of errors; the cause is attached.
        raise _unavailable(name, first_line(error), what) from error
    return model.to(device), processor


def _unavailable(name: str | Path, why: str, what: str) -> ModelError:
    return ModelError(
        f"{what} {str(name)!r} could not be loaded: {why} It must contain a config, a processor and safetensors "
        f"weights. Without network access, download it elsewhere (`hf download {name}`) and give its folder."
    )


def _unsupported(what: str, kind: str | None, kinds: Sequence[str] = tuple(_FAMILIES)) -> ModelError:
    return ModelError(f"{what} has model type {kind!r}, which is not supported here. Supported: {', '.join(kinds)}.")
