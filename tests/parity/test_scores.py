"""Methods that change scores, and FOCUS, against values that the authors' released codes give on the same tensors.

The tensors are waves, so that they do not depend on a random generator. The codes are those of zy1xxx/SPDiffusion,
YaNgZhAnG-V5/attention_regulation (its random first weights set to 0.5), naver-ai/DenseDiffusion,
omer11a/bounded-attention and ericbill21/FOCUS, run in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from elakit.guidance import Attention, AttentionRegulation, BoundedAttention, SPDiffusion
from elakit.guidance.attention_regulation import gaussians
from elakit.guidance.bounded_attention import assigned
from elakit.guidance.dense_diffusion import covered, modulation, of_words
from elakit.guidance.focus import divergence
from elakit.guidance.layout import layout_masks
from elakit.prompt import Entity, Prompt, Token

BOXES = [(0.05, 0.2, 0.45, 0.8), (0.55, 0.2, 0.95, 0.8)]
WORDS = ("a", "red", "car", "and", "a", "blue", "bird")
PROMPT = Prompt(
    "a red car and a blue bird",
    (Entity("red car", "car", ("red",), (3,), (2,), "car"), Entity("blue bird", "bird", ("blue",), (7,), (6,), "bird")),
    tuple(Token(i, word, f"{word}/{i}", i - 1) for i, word in enumerate(WORDS, start=1)),
    end_index=8,
    length=12,
)


def wave(*shape: int, speed: float) -> Tensor:
    """Values from 0 to 1."""
    return ((torch.arange(math.prod(shape), dtype=torch.float64) * speed).sin() + 1).div(2).reshape(shape)


def test_focus() -> None:
    maps = wave(5, 64, speed=1.7)
    groups = maps[:2], maps[2:3], maps[3:]
    alike = (divergence(groups[0]) + divergence(groups[2])) / 2
    apart = 1 - divergence(torch.stack([group.mean(0) for group in groups]))
    assert float((alike + apart) / 2) == pytest.approx(0.6255300791512557, rel=1e-12)


def test_attention_regulation() -> None:
    scores = wave(2, 16, 16, 12, speed=2.9) * 6
    bumps = gaussians((16, 16)).double()
    first = torch.full((2, len(bumps), 2), 0.5, dtype=torch.float64)
    method = AttentionRegulation()
    best = method.optimize(scores, [3, 7], bumps, first)
    addend = method.memory * torch.einsum("cyx,hck->hyxk", bumps, first) + (1 - method.memory) * best
    assert float(addend.sum()) == pytest.approx(1053.6679698710236, rel=1e-6)
    assert addend[0, 4, 5].tolist() == pytest.approx([0.9812954555197848, 0.9638270852418653], rel=1e-6)
    assert addend[1, 8, 12].tolist() == pytest.approx([2.4107913945925556, 0.17227668279852448], rel=1e-5)


def test_bounded_attention() -> None:
    cross = tuple(wave(2, n * n, 12, speed=1.1).movedim(-1, 1).unflatten(2, (n, n)) for n in (4, 8))
    own = tuple(wave(2, n * n, n * n, speed=0.7).unflatten(1, (n, n)).unflatten(3, (n, n)) for n in (4, 8))
    method = BoundedAttention(BOXES)
    loss = method.loss(Attention(cross, own), PROMPT, 0, method.begin(PROMPT, 50))
    assert float(loss.total) == pytest.approx(2.5216368677007255, rel=1e-12)
    assert loss.goal == pytest.approx(1.2608184338503627, rel=1e-12)
    given = layout_masks(method.regions, (16, 16), 2)
    labels = (wave(256, speed=0.3) * 5.999).long().numpy()
    masks = assigned(labels, wave(256, 2, speed=0.05).T, given, given)
    assert masks.sum((1, 2)).tolist() == [67, 153]


def test_spdiffusion() -> None:
    own = wave(24, 24, 24, 24, speed=0.0173) ** 4
    regions = SPDiffusion().find(wave(3, 24, 24, speed=0.37), own / own.sum((-1, -2), keepdim=True))
    places = torch.from_numpy(regions).flatten(1) * torch.arange(1, 577)
    assert regions.sum((1, 2)).tolist() == [218, 191, 311]
    assert places.sum(1).tolist() == [63212, 54594, 90104]


def test_dense_diffusion() -> None:
    scores = wave(2, 64, 20, speed=2.3) * 4
    regions = torch.zeros(2, 8, 8, dtype=torch.bool)
    regions[0, :, :3] = regions[1, 2:, 5:] = True
    flat = regions.flatten(1)
    amount = 0.8**5 * (1 - covered(flat))[:, None]
    changed = scores + modulation(scores, of_words(flat, [(1, 2, 3), (5, 6, 7)], 20), amount)
    assert float(changed.sum()) == pytest.approx(4234.284760956788, rel=1e-6)
    wanted = [2.935884431188345, 1.0379991575986838, 0.776348982698265, 3.022896731287095, 0.29090511509707945]
    assert changed[1, 30, :5].tolist() == pytest.approx(wanted, rel=1e-6)
