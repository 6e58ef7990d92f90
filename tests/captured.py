"""Families that are read at their attention call: the form of their calls, and what these calls receive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from elakit.attention import Recording

TEXT = "a [red car] and a [blue giraffe]"
PLAIN = "a red car and a blue giraffe"


@dataclass
class Spec:
    """Form of a family's attention calls, known from its code in diffusers.

    ``image`` and ``text`` give the first image query and the first text key, from (image patches, keys); ``token`` the
    token whose state stands at a text position, from (position, tokens of the text).
    """

    size: tuple[int, int] = (32, 48)
    options: dict[str, Any] = field(default_factory=dict)
    image: Callable[[int, int], int] = lambda patches, keys: keys - patches
    text: Callable[[int, int], int] = lambda patches, keys: 0
    rows: str = "all"
    second_pass: bool = False  # of the negative prompt, in each step
    token: Callable[[int, int], int] = lambda position, tokens: position


IMAGE = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype("uint8"))
GUIDED = {"negative_prompt": "a dog"}
SPECS = {
    "FLUX.2": Spec((64, 96)),
    "FLUX.2 Klein": Spec((64, 96), second_pass=True),
    "Z-Image": Spec(
        options=GUIDED,
        image=lambda patches, keys: 0,
        text=lambda patches, keys: 32 * math.ceil(patches / 32),
        rows="first half",
    ),
    "Qwen-Image": Spec(options=GUIDED, second_pass=True, token=lambda position, tokens: position + 10),
    "Sana": Spec(
        (32, 64),
        GUIDED | {"use_resolution_binning": False},
        image=lambda patches, keys: 0,
        rows="second half",
        token=lambda position, tokens: position + tokens - 300,
    ),
    "Lumina 2": Spec((64, 96), GUIDED, second_pass=True),
    "AuraFlow": Spec(options=GUIDED, rows="second half", token=lambda position, tokens: position - 8),
    "Chroma": Spec(options=GUIDED, second_pass=True),
    "CogView3-Plus": Spec(options=GUIDED, rows="second half"),
    "CogView4": Spec(options=GUIDED, second_pass=True),
    "HunyuanDiT": Spec(
        (64, 96), GUIDED | {"use_resolution_binning": False}, image=lambda patches, keys: 0, rows="second half"
    ),
    "Kolors": Spec(options=GUIDED, image=lambda patches, keys: 0, rows="second half"),
    "FLUX.1 Kontext": Spec(
        (32, 48),
        {"image": IMAGE, "_auto_resize": False, "max_area": 32 * 48, "max_sequence_length": 20},
        image=lambda patches, keys: 20,  # behind it come the patches of the input image
    ),
}
GENERATED = [name for name in SPECS if name != "FLUX.1 Kontext"]  # elakit.generate passes no input image


def draw(pipe: Any, spec: Spec, **options: Any) -> np.ndarray:
    """Images of a short run of the prompt."""
    height, width = spec.size
    settings = {"num_inference_steps": 2, "output_type": "np", "height": height, "width": width}
    generator = torch.Generator().manual_seed(7)
    return pipe(prompt=PLAIN, generator=generator, **settings | spec.options | options).images


class Witness(TorchFunctionMode):
    """Probabilities of every attention call of the chosen modules, in float64, by the arguments that it receives."""

    def __init__(self, modules: dict[str, Any]) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []
        self.inside: str | None = None
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "inside", name))
            module.register_forward_hook(lambda *_: setattr(self, "inside", None))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside is not None:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key = given["query"].double(), given["key"].double()
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
            scores = query @ key.mT * scale
            if (mask := given.get("attn_mask")) is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            self.seen.append((self.inside, scores.softmax(-1)))
        return func(*args, **kwargs)


def rows_of(spec: Spec, batch: int) -> slice:
    half = batch // 2
    return {"all": slice(0, batch), "first half": slice(0, half), "second half": slice(half, batch)}[spec.rows]


def compare(spec: Spec, pipe: Any, recording: Recording, witness: Witness, images: int) -> None:
    """Assert that every recorded probability is what the attention call received."""
    prompt, layers = recording.prompt, recording.layers
    calls = [witness.seen[i : i + len(layers)] for i in range(0, len(witness.seen), len(layers))]
    calls = calls[::2] if spec.second_pass else calls  # the negative prompt comes second
    assert recording.steps == (0, 1)
    assert len(calls) == 2
    timesteps = pipe.scheduler.timesteps.tolist()
    (node,) = recording.tree.children.values()
    assert node["timestep"].values.tolist() == pytest.approx(timesteps)
    kept = node["probability"]
    patches = kept.sizes["y"] * kept.sizes["x"]
    assert kept.sizes["y"] * spec.size[1] == kept.sizes["x"] * spec.size[0]
    for step, call in enumerate(calls):
        for layer, truth in call:
            truth = truth[rows_of(spec, len(truth))]
            queries = spec.image(patches, truth.shape[-1])
            truth = truth[:, :, queries : queries + patches].unflatten(2, (kept.sizes["y"], kept.sizes["x"]))
            assert len(truth) == images
            text = spec.text(patches, truth.shape[-1])
            for token in prompt.tokens:
                found = kept.sel(layer=layer, step=step, token=token.label).values
                np.testing.assert_allclose(found, truth[..., text + token.index], atol=1e-5)
    labels = {token.index: token.label for token in prompt.tokens}
    car = labels[prompt.find("car")[0]]
    assert float(kept.sel(token=car).std()) > 1e-4  # not all alike, so that a wrong column would be noticed
