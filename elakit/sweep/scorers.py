"""Scorers of the images of a sweep: CLIP, BLIP, VQAScore, perceptual distances and zero-shot detectors.

A scorer is loaded by its name. It computes one or more scores of an image. Each score becomes a column of the sweep's
table. Most scorers compare the image with the prompt. LPIPS and DINO measure the distance to the plain image from the
same noise. Models are loaded with transformers; VQAScore and LPIPS need the packages t2v_metrics and lpips. elakit
contains no weights of scorers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from elakit.errors import ModelError, SettingError
from elakit.judge import FAILURES, judge
from elakit.judge.detectors import load_detector
from elakit.models import device_named, first_line
from elakit.prompt import Prompt

Values = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Input of a scorer: an image with its prompt, its file, and the plain image from the same noise.

    Attributes
    ----------
    image : PIL.Image.Image
        Image to score.
    prompt : Prompt
        Prompt of the image.
    plain : PIL.Image.Image or None
        Plain image from the same noise, to which some scorers measure a distance. None if the sweep did not store this
        image.
    path : str
        Path of the PNG file of the image to score.
    """

    image: Image.Image
    prompt: Prompt
    plain: Image.Image | None
    path: str


Scorer = Callable[[Sample], Values]


@dataclass(frozen=True)
class ScorerKind:
    """A kind of scorer, as listed in `SCORERS`.

    Attributes
    ----------
    name : str
        Name, as given to ``elakit sweep score --scorer``.
    model : str
        Default model: a hub id, or a name that the scorer's package knows. "" if the user must name one.
    summary : str
        Description of the score and its source.
    load : callable
        Function that loads the model and returns the scorer; its arguments are the name of the model and the device.
    """

    name: str
    model: str
    summary: str
    load: Callable[[str, torch.device], Scorer]


def load_scorer(name: str, model: str | None = None, device: str | None = None) -> Scorer:
    """Load a scorer by its name.

    Parameters
    ----------
    name : str
        A name in `SCORERS`.
    model : str, optional
        Hub id or folder of the model; by default the `ScorerKind.model` of this scorer.
    device : str, optional
        Name of the device, such as "cpu" or "cuda:1". Default: CUDA where it is available, otherwise the CPU.

    Returns
    -------
    callable
        The scorer: a function that takes a `Sample` and returns a dictionary with the scores of its image. The keys are
        names of columns of the sweep's table.

    Raises
    ------
    SettingError
        There is no such scorer, or no model is given and the scorer has no default.
    ModelError
        The model cannot be loaded, or a Python package that the scorer needs is missing.

    Examples
    --------
    >>> load_scorer("fid")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: There is no scorer 'fid'. Choose from clip, ...
    """
    if name not in SCORERS:
        raise SettingError(f"There is no scorer {name!r}. Choose from {', '.join(SCORERS)}.")
    kind = SCORERS[name]
    chosen = model or kind.model
    if not chosen:
        raise SettingError(
            f"The scorer {name} has no default model. Name one: {name}=MODEL, where MODEL is a hub id or a folder."
        )
    return kind.load(chosen, device_named(device))


# --- CLIP ---------------------------------------------------------------------------------------------------


def clip(name: str, device: torch.device) -> Scorer:
    """Load the CLIP model `name`, and return a scorer of the similarity between an image and its prompt.

    The scorer computes two columns of the sweep's table. "clip_full" is the cosine similarity of the image and the full
    prompt. "clip_min" is the smallest cosine similarity of the image and the text of one entity, such as "a red car".

    Attend-and-Excite (Chefer et al., SIGGRAPH 2023, section 5) reports both values. The paper puts each text into 80
    sentence templates and averages over the templates. elakit uses the text alone, so its values differ slightly.
    """
    model, processor = _load(transformers.CLIPModel, transformers.CLIPProcessor, name, device)

    def score(sample: Sample) -> Values:
        image = _clip_image(model, processor, sample.image)
        similarities = [float(image @ _clip_text(model, processor, text)) for text in _texts(sample.prompt)]
        return {"clip_full": similarities[0], "clip_min": min(similarities[1:])}

    return score


def caption(name: str, device: torch.device) -> Scorer:
    """Load BLIP and CLIP, and return a scorer that compares the prompt with a caption of the image.

    The scorer computes two columns of the sweep's table. "caption" is the text that BLIP generates for the image.
    "caption_similarity" is the cosine similarity between the CLIP embedding of the prompt and the CLIP embedding of the
    caption. The measure is from Attend-and-Excite (Chefer et al., SIGGRAPH 2023, section 5).

    `name` is the name of a BLIP captioning model. To choose the CLIP model, too, append "|" and the name of the CLIP
    model.
    """
    blip_name, _, clip_name = name.partition("|")
    blip, blip_processor = _load(
        transformers.BlipForConditionalGeneration, transformers.BlipProcessor, blip_name, device
    )
    model, processor = _load(transformers.CLIPModel, transformers.CLIPProcessor, clip_name or CLIP, device)

    def score(sample: Sample) -> Values:
        inputs = blip_processor(images=sample.image.convert("RGB"), return_tensors="pt").to(device)
        with torch.no_grad():
            tokens = blip.generate(**inputs, max_new_tokens=30)
        text = blip_processor.decode(tokens[0], skip_special_tokens=True).strip()
        similarity = _clip_text(model, processor, sample.prompt.text) @ _clip_text(model, processor, text)
        return {"caption": text, "caption_similarity": float(similarity)}

    return score


def _clip_image(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(model.device)
    with torch.no_grad():
        pooled = model.vision_model(**inputs).pooler_output
        return F.normalize(model.visual_projection(pooled)[0].float(), dim=0)


def _clip_text(model: Any, processor: Any, text: str) -> torch.Tensor:
    inputs = processor(
        text=[text], return_tensors="pt", truncation=True, max_length=model.config.text_config.max_position_embeddings
    ).to(model.device)
    with torch.no_grad():
        pooled = model.text_model(**inputs).pooler_output
        return F.normalize(model.text_projection(pooled)[0].float(), dim=0)


def _texts(prompt: Prompt) -> list[str]:
    """List of texts: first the prompt, then the text of each entity of the prompt, such as "a red car"."""
    return [prompt.text, *(entity.text for entity in prompt.entities)]


# --- visual question answering ------------------------------------------------------------------------------


def blip_vqa(name: str, device: torch.device) -> Scorer:
    """Load the BLIP model `name` for visual question answering, and return a scorer that asks for each entity.

    The scorer asks one question per entity, such as "a red car?", and computes the probability that the answer is "yes"
    and not "no". The column "blip_vqa" of the sweep's table is the product of these probabilities, 0 to 1.

    The measure is from T2I-CompBench (Huang et al., NeurIPS 2023, section 4.1). The paper asks for each noun phrase of
    the prompt. elakit asks for each entity with its attributes.
    """
    model, processor = _load(transformers.BlipForQuestionAnswering, transformers.BlipProcessor, name, device)
    yes, no = (processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))

    def probability(image: Image.Image, question: str) -> float:
        inputs = processor(images=image.convert("RGB"), text=question, return_tensors="pt").to(device)
        with torch.no_grad():
            seen = model.vision_model(inputs.pixel_values)[0]
            mask = torch.ones(seen.shape[:-1], dtype=torch.long, device=device)
            asked = model.text_encoder(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=mask,
            )[0]
            start = torch.full((1, 1), model.decoder_start_token_id, dtype=torch.long, device=device)
            answer = model.text_decoder(
                input_ids=start, encoder_hidden_states=asked, encoder_attention_mask=inputs.attention_mask
            )
        p_yes, _ = answer.logits[0, 0, [yes, no]].float().softmax(-1).tolist()
        return float(p_yes)

    def score(sample: Sample) -> Values:
        questions = [f"{entity.text}?" for entity in sample.prompt.entities]
        return {"blip_vqa": float(np.prod([probability(sample.image, question) for question in questions]))}

    return score


def vqascore(name: str, device: torch.device) -> Scorer:
    """Load the model `name` with the package t2v_metrics, and return a scorer that computes VQAScore.

    VQAScore (Lin et al., ECCV 2024) is the probability with which a model for visual question answering confirms that
    the image shows the prompt. The score is the column "vqascore" of the sweep's table. The package t2v_metrics is by
    the authors of VQAScore.
    """
    package = _package("t2v_metrics", "pip install t2v-metrics")
    model = package.VQAScore(model=name, device=str(device))

    def score(sample: Sample) -> Values:
        with torch.no_grad():
            found = model(images=[sample.path], texts=[sample.prompt.text])
        return {"vqascore": float(found[0][0])}

    return score


# --- distance to the plain image ----------------------------------------------------------------------------


def lpips(name: str, device: torch.device) -> Scorer:
    """Load the network `name` with the package lpips, and return a scorer of an image's distance to the plain image.

    The column "lpips" of the sweep's table is the LPIPS distance (Zhang et al., CVPR 2018) between an image and the
    plain image from the same noise. The value is None if the plain image was not stored.
    """
    model = _package("lpips", "pip install lpips").LPIPS(net=name).to(device)

    def tensor(image: Image.Image) -> torch.Tensor:
        array = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
        return torch.from_numpy(array).permute(2, 0, 1)[None].to(device)

    def score(sample: Sample) -> Values:
        if sample.plain is None:
            return {"lpips": None}
        with torch.no_grad():
            return {"lpips": float(model(tensor(sample.image), tensor(sample.plain)))}

    return score


def dino(name: str, device: torch.device) -> Scorer:
    """Load the DINO model `name`, and return a scorer of an image's distance to the plain image.

    The column "dino_distance" of the sweep's table compares an image with the plain image from the same noise. The
    distance is the cosine distance between the class tokens of the two images. The value is None if the plain image
    was not stored.
    """
    model, processor = _load(transformers.AutoModel, transformers.AutoImageProcessor, name, device)

    def features(image: Image.Image) -> torch.Tensor:
        inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(device)
        with torch.no_grad():
            return F.normalize(model(**inputs).last_hidden_state[0, 0].float(), dim=0)

    def score(sample: Sample) -> Values:
        if sample.plain is None:
            return {"dino_distance": None}
        return {"dino_distance": 1 - float(features(sample.image) @ features(sample.plain))}

    return score


# --- detectors ----------------------------------------------------------------------------------------------


def detector(name: str, device: torch.device) -> Scorer:
    """Load the zero-shot detector `name` with `elakit.judge.detectors`, and return a scorer that judges an image.

    The scorer computes these columns of the sweep's table:

    - detector_success: True if the image is right according to the detector.
    - detector_neglect, detector_mixture, detector_wrong_color: True if the image has the failure of this name.
    - detector_present: share of the entities that are in the image.
    - detector_score: mean confidence of the detector in the things that it finds, 0 to 1; None if it finds nothing.
    """
    find = load_detector(name, device=str(device))

    def score(sample: Sample) -> Values:
        verdict = judge(sample.image, sample.prompt, find)
        failures = {f"detector_{kind.replace(' ', '_')}": kind in verdict.failures for kind in FAILURES}
        scores = [thing.score for thing in verdict.things]
        return {
            "detector_success": bool(verdict.success),
            **failures,
            "detector_present": float(np.mean(list(verdict.present.values()))),
            "detector_score": float(np.mean(scores)) if scores else None,
        }

    return score


CLIP = "openai/clip-vit-base-patch16"  # the model that Attend-and-Excite uses
SCORERS: Mapping[str, ScorerKind] = {
    each.name: each
    for each in (
        ScorerKind("clip", CLIP, "CLIP image-text similarity: full prompt, minimum over entities", clip),
        ScorerKind(
            "caption",
            "Salesforce/blip-image-captioning-base",
            "CLIP text-text similarity of the prompt and a BLIP caption",
            caption,
        ),
        ScorerKind("blip-vqa", "Salesforce/blip-vqa-base", "BLIP-VQA as in T2I-CompBench", blip_vqa),
        ScorerKind("vqascore", "clip-flant5-xxl", "VQAScore, by the package t2v_metrics", vqascore),
        ScorerKind("lpips", "alex", "LPIPS distance to the plain image, by the package lpips", lpips),
        ScorerKind("dino", "facebook/dino-vitb16", "DINO feature distance to the plain image", dino),
        ScorerKind("detector", "", "verdict of a zero-shot detector, such as google/owlv2-base-patch16", detector),
    )
}


def _load(model_class: Any, processor_class: Any, name: str, device: torch.device) -> tuple[Any, Any]:
    try:
        model = model_class.from_pretrained(name, use_safetensors=True).to(device).eval()
        return model, processor_class.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"The model {name!r} cannot be loaded as {model_class.__name__}: {first_line(error)} Give the folder or "
            f"hub id of a model for {model_class.__name__} with safetensors weights."
        ) from error


def _package(name: str, command: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"A chosen scorer needs the package {name}, which is not installed. Install it with  {command}"
        ) from error
