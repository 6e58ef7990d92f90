"""Maps of concepts in families that are read at their attention call, compared with passes of the bare denoiser."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captured import SPECS, TEXT, Witness, draw, rows_of
from tiny_families import BUILDERS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from elakit.attention import Edit, edit, map_concepts, record
from elakit.attention.concept_readers import Reader
from elakit.errors import RecordingError
from elakit.models import adapter_for
from elakit.prompt import parse

CROSS = ["Sana", "HunyuanDiT"]
JOINT = [name for name in SPECS if name not in (*CROSS, "Kolors")]
WORDS = ["red dog", "bear"]


@dataclass
class Bare:
    """A family's denoiser, run without elakit on the concepts alone.

    ``stack`` and ``attention`` are the names of its blocks and of their attention modules; ``text`` the arguments that
    replace the text's, from (states, positions of their tokens); ``before`` the number of text positions before the
    first concept.
    """

    stack: str
    attention: str = "attn"
    before: int = 0
    fixed: bool = True  # whether the image's rotary positions are the same for every text


def given_text(name: str, states: Tensor, positions: list[int]) -> dict[str, Any]:
    """Arguments of the denoiser for a text that consists of these states."""
    count = len(states)
    if name == "Z-Image":
        return {"cap_feats": [states]}
    found: dict[str, Any] = {"encoder_hidden_states": states[None]}
    if name in ("FLUX.1 Kontext", "Chroma"):
        found["txt_ids"] = torch.zeros(count, 3)
    if name.startswith("FLUX.2"):
        found["txt_ids"] = torch.tensor([[[0, 0, 0, at] for at in positions]])
    if name == "Chroma":
        found["attention_mask"] = None
    if name == "Lumina 2":
        found["encoder_attention_mask"] = torch.ones(1, count, dtype=torch.bool)
    if name == "Qwen-Image":
        found["encoder_hidden_states_mask"] = None
        if diffusers.__version__.startswith("0.35."):  # later releases read the number from the states
            found["txt_seq_lens"] = [count]
    return found


BARE = {
    "FLUX.2": Bare("transformer_blocks"),
    "FLUX.2 Klein": Bare("transformer_blocks"),
    "Z-Image": Bare("layers", "attention"),
    "Qwen-Image": Bare("transformer_blocks"),
    "Lumina 2": Bare("layers", fixed=False),
    "AuraFlow": Bare("joint_transformer_blocks", before=8),
    "Chroma": Bare("transformer_blocks"),
    "CogView3-Plus": Bare("transformer_blocks", "attn1"),
    "CogView4": Bare("transformer_blocks", "attn1"),
    "FLUX.1 Kontext": Bare("transformer_blocks"),
}


class Calls(TorchFunctionMode):
    """Query, key and value of the attention calls of some modules, in the order of the calls."""

    def __init__(self, modules: list[Any]) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []
        self.inside = False
        for module in modules:
            module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
            module.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            heads = given["query"].shape[1] // given["key"].shape[1]
            self.seen.append(
                {name: given[name].detach() for name in ("query", "attn_mask") if given.get(name) is not None}
                | {name: given[name].detach().repeat_interleave(heads, 1) for name in ("key", "value")}
            )
            self.inside = False
        return func(*args, **kwargs)


def outputs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """Attention outputs (queries, channels) of one row, in float64; arguments (heads, n, d)."""
    q, k, v = (x.double().numpy() for x in (query, key, value))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + (np.where(mask, 0, -np.inf) if mask.dtype == torch.bool else mask.double().numpy())
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    found = powers / powers.sum(-1, keepdims=True) @ v
    return found.transpose(1, 0, 2).reshape(len(found[0]), -1)


def first_call(pipe: Any, row: int, run: Callable[[], Any]) -> dict[str, Any]:
    """Arguments of the first denoiser call of a run for one row, by name, in float64."""
    found: list[dict[str, Any]] = []
    names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        found.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    run()
    handle.remove()
    batch = len(found[0][names[0]])

    def exact(value: Any) -> Any:
        if isinstance(value, Tensor | list) and len(value) == batch:
            value = value[row : row + 1]
        if isinstance(value, list):
            return [exact(one) for one in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: exact(value) for name, value in found[0].items()}


def passed(net: Any, bare: Bare, given: dict[str, Any], image: slice, kept: list[Tensor] | None) -> Any:
    """Attention calls of a pass of the bare denoiser, and the image's part of the input of each block.

    ``kept``: inputs that replace the image's part, those of another pass.
    """
    blocks = getattr(net, bare.stack)
    inputs: list[Tensor] = []

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        whole = args[0] if args else kwargs["hidden_states"]
        joined = "encoder_hidden_states" not in kwargs
        part = whole[:, image] if joined else whole
        inputs.append(part)
        if kept is None:
            return None
        whole = whole.clone() if joined else kept[len(inputs) - 1]
        if joined:
            whole[:, image] = kept[len(inputs) - 1]
        return ((whole, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": whole})

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    with torch.no_grad(), Calls([getattr(block, bare.attention) for block in blocks]) as calls:
        net(**given)
    for handle in handles:
        handle.remove()
    return calls.seen, inputs


@pytest.mark.parametrize("name", JOINT)
def test_concepts_are_a_text_that_sees_the_image(name: str) -> None:
    """Compare every layer with a pass of the bare denoiser, in float64, on the concepts alone as its text."""
    spec, bare, pipe = SPECS[name], BARE[name], BUILDERS[name]()
    adapter, net = adapter_for(pipe), copy.deepcopy(pipe.transformer).double()
    row = 1 if spec.rows == "second half" else 0
    given = first_call(pipe, row, lambda: draw(pipe, spec, num_inference_steps=1))
    tokens = [[token.index for token in parse(f"[{word}]", pipe).tokens] for word in WORDS]
    ends = np.cumsum([len(at) for at in tokens])
    states = []
    for word, at in zip(WORDS, tokens, strict=True):
        inputs = adapter.encode(word, guided=False).inputs
        every = inputs["cap_feats"][0] if name == "Z-Image" else inputs["encoder_hidden_states"][0]
        states.append(every[[index - bare.before for index in at]])
    text = torch.cat(states).double()
    count = len(text)
    with map_concepts(pipe, TEXT, WORDS) as found:
        draw(pipe, spec, num_inference_steps=1)
    rows, columns = found.maps().shape[-2:]
    patches = rows * columns

    later = name == "Z-Image"  # the text follows the image
    part = slice(0, 32) if later else slice(-patches, None)  # the image in one sequence with the text
    seen, inputs = passed(net, bare, given, part, None)
    keys = seen[0]["key"].shape[-2]
    first = spec.image(patches, keys)
    beside = slice(0, spec.text(patches, keys)) if later else slice(first, None)  # the image among the keys
    replaced = given | given_text(name, text, [at for each in tokens for at in each])
    others, _ = passed(net, bare, replaced, part, inputs)
    stop = others[0]["key"].shape[-2]
    own = slice(32, None) if later else slice(0, stop - (keys - first))  # the text among the keys
    start = 32 if later else bare.before
    for number in range(len(seen) if bare.fixed else 1):
        run, alone = seen[number], others[number]
        image = outputs(
            run["query"][0, :, first : first + patches],
            run["key"][0],
            run["value"][0],
            run["attn_mask"].expand(1, -1, keys, keys)[0, :, first : first + patches] if "attn_mask" in run else None,
        )
        joined = [torch.cat([alone[part][0, :, own], run[part][0, :, beside]], dim=1) for part in ("key", "value")]
        concepts = outputs(alone["query"][0, :, start : start + count], *joined)
        scores = np.split(image @ concepts.T, ends[:-1], axis=1)
        powers = np.exp(np.stack([each.mean(1) for each in scores]))
        expected = (powers / powers.sum(0)).reshape(len(WORDS), rows, columns)
        with map_concepts(pipe, TEXT, WORDS, layers=f"{bare.stack}.{number}.{bare.attention}") as found:
            draw(pipe, spec, num_inference_steps=1)
        np.testing.assert_allclose(found.maps()[0], expected, atol=1e-5)
        assert float(found.maps().std()) > 1e-4  # not all alike


@pytest.mark.parametrize("name", [*JOINT, *CROSS])
def test_image_and_recording_do_not_see_the_concepts(name: str) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    several = {"num_images_per_prompt": 2}
    plain = draw(pipe, spec, **several)
    with record(pipe, TEXT) as alone:
        draw(pipe, spec, **several)
    with map_concepts(pipe, TEXT, WORDS) as found, record(pipe, TEXT) as inner:
        assert np.array_equal(plain, draw(pipe, spec, **several))
    with record(pipe, TEXT) as outer, map_concepts(pipe, TEXT, WORDS) as again:
        assert np.array_equal(plain, draw(pipe, spec, **several))
    np.testing.assert_array_equal(inner.maps(), alone.maps())
    np.testing.assert_array_equal(outer.maps(), alone.maps())
    np.testing.assert_array_equal(found.maps(image=1), again.maps(image=1))
    assert found.maps().shape == (2, 2, *alone.sizes[0])
    assert found.maps().timestep.values.tolist() == alone.nodes()[0]["timestep"].values.tolist()
    assert float(found.maps().min()) > 0
    if name in JOINT:
        np.testing.assert_allclose(found.maps().sum("concept"), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["Qwen-Image", "AuraFlow", "Sana"])
def test_an_edit_changes_the_image_that_is_compared_and_not_the_concepts(name: str) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    plain = draw(pipe, spec)
    with map_concepts(pipe, TEXT, WORDS) as found:
        draw(pipe, spec)
    with edit(pipe, TEXT, Edit("car", scale=1)), map_concepts(pipe, TEXT, WORDS) as same:
        assert np.array_equal(plain, draw(pipe, spec))
    np.testing.assert_array_equal(found.maps(), same.maps())
    with map_concepts(pipe, TEXT, WORDS) as other, edit(pipe, TEXT, Edit("car", scale=0)):
        changed = draw(pipe, spec)
    with edit(pipe, TEXT, Edit("car", scale=0)):
        assert np.array_equal(changed, draw(pipe, spec))
    assert not np.array_equal(found.maps(), other.maps())


@pytest.mark.parametrize("name", CROSS)
def test_a_concept_with_the_states_of_a_word_gets_that_word_s_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a prompt whose token gets p in float64, a second token with the same state gets p / (1 + p)."""
    spec, pipe = SPECS[name], BUILDERS[name]()
    prompt, adapter = parse(TEXT, pipe), adapter_for(pipe)
    cars, family = prompt.find("car"), type(adapter)
    encode, same = family.encode, parse("[dog]", pipe)

    def encoded(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        if text != "dog":
            return encode(self, text, *args, **kwargs)
        # the word's states stand where those of the concept are read
        found = encode(self, prompt.text, *args, **kwargs)
        inputs = dict(found.inputs)
        first = 0
        for suffix in ("", "_t5") if name == "HunyuanDiT" else ("",):
            states = inputs[f"encoder_hidden_states{suffix}"]
            (car,) = (at - first for at in cars if first <= at < first + states.shape[1])
            inputs[f"encoder_hidden_states{suffix}"] = states[:, [car]].expand(-1, states.shape[1], -1)
            first += states.shape[1]
        for mask in inputs.keys() & {"encoder_attention_mask", "text_embedding_mask", "text_embedding_mask_t5"}:
            inputs[mask] = torch.ones_like(inputs[mask])
        return replace(found, inputs=inputs)

    assert len(same.tokens) == len(cars)
    monkeypatch.setattr(family, "encode", encoded)
    witness = Witness({layer.name: layer.module for layer in adapter.layers()})
    with map_concepts(pipe, prompt, ["dog"]) as found, witness:
        draw(pipe, spec)
    layers = len(adapter.layers())
    for step in range(2):
        calls = witness.seen[step * layers : (step + 1) * layers]
        every = [truth[rows_of(spec, len(truth))][0][..., cars] for _, truth in calls]
        expected = torch.stack([(p / (1 + p)).mean((0, 2)) for p in every]).mean(0)
        np.testing.assert_allclose(found.maps()[step, 0].values.ravel(), expected, atol=1e-6)


def test_outputs_in_half_precision_are_compared_in_single_precision() -> None:
    pipe = BUILDERS["Chroma"]()
    reader = Reader(adapter_for(pipe), TEXT, ["dog", "car"], lambda timestep: None, lambda maps, size: None)
    draws = torch.Generator().manual_seed(0)
    image = torch.randn(1, 6, 512, generator=draws).bfloat16()
    shared = 25 * torch.sign(image.mean(1, keepdim=True))  # scores in the hundreds that differ by less than 1
    concepts = (shared + torch.randn(1, sum(reader.counts), 512, generator=draws) / 32).bfloat16()
    scores = image.double() @ concepts.double().mT
    means = torch.stack([part.mean(-1) for part in scores.split(reader.counts, dim=-1)], dim=-1)
    assert float(scores.abs().max()) > 100
    torch.testing.assert_close(
        reader.compare(image, concepts).double(), means.softmax(-1).movedim(-1, 1), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", ["Chroma", "HunyuanDiT"])
def test_an_attention_call_that_cannot_be_read_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()

    def other(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    with pytest.raises(RecordingError, match="without calling"), map_concepts(pipe, TEXT, WORDS):
        draw(pipe, spec)
