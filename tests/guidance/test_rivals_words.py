"""The rivals that read words' cross-attention: Attend-and-Excite, SynGen, Divide & Bind and EBAMA."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline
from tiny import tiny_pipeline

from elakit.generation import generate
from elakit.guidance import Attention, Guide
from elakit.guidance.attend_excite import AttendAndExcite
from elakit.guidance.divide_bind import DivideAndBind
from elakit.guidance.ebama import EBAMA
from elakit.guidance.engine import gradient
from elakit.guidance.syngen import SynGen
from elakit.models import adapter_for
from elakit.prompt import Entity, Prompt, Token, parse
from elakit.run import open_run

PAIR = "a [red car] and a [blue bird]"
METHODS = [AttendAndExcite(), SynGen(), SynGen(lone_nouns=True), DivideAndBind(), EBAMA()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def hand_made(pieces: int = 1, car: tuple[int, ...] = (1,)) -> Prompt:
    """The prompt "red car blue bird" from position 1, with some pieces of "bird" and two positions of end-of-text."""
    names = ["red", "car", "blue", *["bird"] * pieces]
    tokens = tuple(Token(i, name, f"{name}/{i}", min(i, 4) - 1) for i, name in enumerate(names, start=1))
    bird = tuple(range(4, 4 + pieces))
    entities = (
        Entity("red car", "car", ("red",) * len(car), (2,), car, "car"),
        Entity("blue bird", "bird", ("blue",), bird, (3,), "bird"),
    )
    return Prompt("red car blue bird", entities, tokens, len(names) + 1, len(names) + 3)


def attention_of(words: Any, end: Any = 0.0) -> Attention:
    """Given maps of the words (token, y, x) and of the first end-of-text; start-of-text and the last are of no matter.

    The large values of those two would show if a method did not leave them out.
    """
    words = torch.as_tensor(words, dtype=torch.float64)
    edge = torch.full((1, *words.shape[1:]), 0.7, dtype=torch.float64)
    end = torch.zeros_like(edge) + torch.as_tensor(end, dtype=torch.float64)
    return Attention((torch.cat([edge, words, end, edge])[None],))


def of_shares(shares: Any) -> Attention:
    """Attention that a softmax over 100 times itself turns into given shares of (words..., end), (token, y, x)."""
    logits = torch.as_tensor(shares, dtype=torch.float64).log() / 100 + 0.05
    return attention_of(logits[:-1], logits[-1])


def loss_of(method: Any, attention: Attention, prompt: Prompt, step: int = 0, state: Any = None) -> Any:
    return method.loss(attention, prompt, step, method.begin(prompt, 50) if state is None else state)


# -- losses worked out by hand -----------------------------------------------------------------------------------------

# The kernel (e^-1, 1, e^-1) / (1 + 2 e^-1) on one axis: its middle, and both sides, which an edge reflects into one.
MIDDLE = 0.576116885
SIDES = 0.423883115


def test_attend_and_excite_takes_the_largest_smoothed_share_of_the_most_neglected() -> None:
    # The car has .9 of the middle location of nine, .1 of the others; the rest is shared evenly. Smoothed, the car is
    # largest in the middle, .1 + .8 MIDDLE^2, and the bird in a corner, .225 - .2 SIDES^2, as reflection turns both
    # neighbors of a corner into the middle row and column.
    shares = torch.full((5, 3, 3), 0.225)
    shares[1] = 0.1
    shares[:, 1, 1] = 0.025
    shares[1, 1, 1] = 0.9
    loss = loss_of(AttendAndExcite(), of_shares(shares), hand_made())
    car, bird = 0.1 + 0.8 * MIDDLE**2, 0.225 - 0.2 * SIDES**2
    assert (car, bird) == (pytest.approx(0.3655285), pytest.approx(0.1890646))
    assert float(loss.total) == pytest.approx(1 - bird, abs=1e-7)
    assert loss.terms == {"neglect": pytest.approx(1 - (car + bird) / 2, abs=1e-7)}


def test_a_noun_of_two_tokens_has_the_mean_of_their_maps() -> None:
    shares = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.06, 0.04])[:, None, None].expand(-1, 3, 3)
    loss = loss_of(AttendAndExcite(), of_shares(shares), hand_made(pieces=2))
    assert float(loss.total) == pytest.approx(1 - 0.18, abs=1e-6)


def two_cells(*left: float) -> Attention:
    """Maps of two locations with a share of each token's attention in the left one; how much there is in all varies."""
    return attention_of([[[0.01 * i * share, 0.01 * i * (1 - share)]] for i, share in enumerate(left, start=1)])


# Divergence of (a, 1 - a) from (b, 1 - b) is (a - b) (logit a - logit b) / 2, and the logits of 1/2, 4/5, 1/3 and 1/5
# are 0, 2, -1 and -2 times ln 2. So in units of ln 2, with red 1/2, car 4/5, blue 1/3, bird 1/5:
#   red-car .3, blue-bird 1/15, car-blue .7, car-bird 1.2, red-blue 1/12, red-bird .3
@pytest.mark.parametrize(
    ("pieces", "alike", "unlike"),
    [
        # each pair's others: -1/2 [(.7 + 1.2)/2 + (1/12 + .3)/2] and -1/2 [(.3 + 1.2)/2 + (1/12 + .7)/2]
        (1, 0.3 + 1 / 15, -2 * 0.5 * (0.95 + 0.1916667)),
        # the bird's second piece is just like blue (0, so the first one counts), and one of the car's others; of each
        # other than the bird the piece counts that is less like it, for red and car the first one too:
        # -1/2 [(.7 + 1.2 + .7)/3 + (1/12 + .3 + 1/12)/3] and -1/2 [(.3 + 1.2)/2 + (1/12 + .7)/2]
        (2, 0.3 + 1 / 15, -0.5 * (0.8666667 + 0.1555556) - 0.5 * (0.75 + 0.3916667)),
    ],
)
def test_syngen_draws_pairs_together_and_away_from_the_other_words(pieces: int, alike: float, unlike: float) -> None:
    attention = two_cells(1 / 2, 4 / 5, 1 / 3, 1 / 5, *[1 / 3] * (pieces - 1))
    loss = loss_of(SynGen(), attention, hand_made(pieces))
    assert loss.terms["alike"] == pytest.approx(alike * math.log(2), rel=1e-5)
    assert loss.terms["unlike"] == pytest.approx(unlike * math.log(2), rel=1e-5)
    assert float(loss.total) == pytest.approx((alike + unlike) * math.log(2), rel=1e-5)


@pytest.mark.parametrize(("lone", "car"), [(False, 0.0), (True, -(0.3 + 0.7 + 1.2) / 3)])
def test_syngen_leaves_nouns_without_attributes_out_unless_asked(lone: bool, car: float) -> None:
    # "red" is a word like any other now; the bird's pair is as above
    loss = loss_of(SynGen(lone_nouns=lone), two_cells(1 / 2, 4 / 5, 1 / 3, 1 / 5), hand_made(car=()))
    bird = 1 / 15 - 0.5 * (0.75 + 0.3916667)
    assert float(loss.total) == pytest.approx((car + bird) * math.log(2), rel=1e-5)


# Shares of red, car, blue, bird, end in the left and the right column of 2 x 2 locations: the car's total variation is
# above .1, the bird's below, and red is where the car is not.
COLUMNS = {"red": (0.02, 0.9), "car": (0.9, 0.02), "blue": (0.02, 0.03), "bird": (0.03, 0.02), "end": (0.03, 0.03)}


@pytest.mark.parametrize(("steps", "step", "weight"), [(50, 0, 1), (50, 9, 1), (50, 10, 5), (50, 20, 10), (10, 2, 5)])
def test_divide_and_bind_weighs_variation_against_binding(steps: int, step: int, weight: float) -> None:
    # Smoothing mixes the two columns, and nothing varies along y, so all can be done on pairs of numbers.
    soft = {name: (MIDDLE * a + SIDES * b, MIDDLE * b + SIDES * a) for name, (a, b) in COLUMNS.items()}

    def spread(values: tuple[float, ...]) -> list[float]:
        return [math.exp(value) / (2 * sum(map(math.exp, values))) for value in values]

    def binding(attribute: str, noun: str, share: float) -> float:
        scale = max(soft[noun]) / max(soft[attribute])
        both = spread(soft[noun]), spread(tuple(scale * value for value in soft[attribute]))
        cut = share * max(both[0])  # the noun's threshold serves both
        p, q = ([max(0, value - cut) + 1e-5 for value in values] for values in both)
        halves = [
            (a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))) / 2 for a, b in zip(p, q, strict=True)
        ]
        return 2 * sum(halves)  # two rows

    variation = [abs(soft[noun][0] - soft[noun][1]) for noun in ("car", "bird")]
    assert variation[1] < 0.1 < variation[0]
    bound = [binding("red", "car", 0.2), binding("blue", "bird", 0.3)]
    columns = torch.tensor(list(COLUMNS.values()), dtype=torch.float64)[:, None].expand(-1, 2, -1)
    loss = loss_of(DivideAndBind(), of_shares(columns), hand_made(), step, steps)
    assert loss.terms["variation"] == pytest.approx(sum(variation) / 2, rel=1e-6)
    assert loss.terms["binding"] == pytest.approx(sum(bound) / 2, rel=1e-4)
    wanted = max(weight * one - varied for one, varied in zip(bound, variation, strict=True))
    assert float(loss.total) == pytest.approx(wanted, rel=1e-4)


def test_an_attribute_in_proportion_to_its_noun_is_bound_and_more_of_it_changes_nothing() -> None:
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[0] = 0.2 * maps[1]  # red to car
    maps[2] = 3 * maps[3]  # blue to bird
    loss = loss_of(DivideAndBind(), of_shares(maps / maps.sum(0)), hand_made())
    assert loss.terms["binding"] == pytest.approx(0, abs=1e-12)
    assert loss.terms["variation"] > 0.01


def test_divide_and_bind_reads_attributes_from_the_finer_maps_thinned_out() -> None:
    shares = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (coarse,) = of_shares(shares / shares.sum(0)).cross
    fine = torch.rand(1, 7, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fine[..., ::2, ::2] = coarse  # of two by two locations the first is kept
    alone, both = (loss_of(DivideAndBind(), Attention(layers), hand_made()) for layers in ((coarse,), (fine, coarse)))
    assert both.terms == pytest.approx(alone.terms, rel=1e-12)
    fine[0, 1, ::2, ::2] += 0.01 * shares[0]  # red
    changed = loss_of(DivideAndBind(), Attention((fine, coarse)), hand_made())
    assert changed.terms["variation"] == alone.terms["variation"]
    assert changed.terms["binding"] > 1.01 * alone.terms["binding"]


def test_ebama_draws_attributes_to_objects_and_objects_from_the_rest() -> None:
    # Cosines: red-car and car-bird 1/sqrt 2, blue-bird and red-bird 1/2, car-blue 0; so the attributes are .2928932 and
    # .5 away, and the others on the mean (1 + .2928932)/2 from the car, (.5 + .2928932)/2 from the bird. Maps as faint
    # as these have even shares, .2 each: the objects' largest add -.5 (.2 + .2).
    red, car, blue, bird = [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]
    faint = 1e-7 * torch.tensor([red, car, blue, bird], dtype=torch.float64).view(4, 2, 2)
    loss = loss_of(EBAMA(), attention_of(faint), hand_made())
    assert loss.terms["attract"] == pytest.approx(0.7928932)
    assert loss.terms["repel"] == pytest.approx(-0.6464466 - 0.3964466)
    assert loss.terms["intensity"] == pytest.approx(-0.4, abs=1e-4)
    assert float(loss.total) == pytest.approx(-0.45, abs=1e-4)
    without = loss_of(EBAMA(intensity=0), attention_of(faint), hand_made())
    assert float(without.total) == pytest.approx(-0.25)


def test_ebama_takes_the_least_alike_piece_and_repels_once_for_every_attribute() -> None:
    # "a red old car" of one object, "car" in two pieces. Cosines with its pieces: a 0, 1; red 1, 0; old 1/sqrt 2 twice.
    names = ["a", "red", "old", "ca", "r"]
    tokens = tuple(Token(i, name, f"{name}/{i}", min(i, 4) - 1) for i, name in enumerate(names, start=1))
    car = Entity("a red old car", "car", ("red", "old"), (4, 5), (2, 3), "car")
    prompt = Prompt("a red old car", (car,), tokens, 6, 8)
    maps = 1e-7 * torch.tensor([[0, 1], [1, 0], [1, 1], [1, 0], [0, 1]], dtype=torch.float64).view(5, 1, 2)
    loss = loss_of(EBAMA(intensity=0), attention_of(maps.expand(-1, 2, -1)), prompt)
    assert loss.terms["attract"] == pytest.approx(1 + 0.2928932)
    assert loss.terms["repel"] == pytest.approx(-2 * 1)


# -- every method ------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("kind", ["zero", "constant", "one token takes all", "one location takes all"])
def test_loss_and_gradient_are_finite_where_maps_say_nothing(method: Any, kind: str) -> None:
    maps = torch.full((2, 7, 4, 4), 1 / 7 if kind == "constant" else 0.0)
    if kind == "one token takes all":
        maps[:, 2] = 1
    elif kind == "one location takes all":
        maps[:, 2, 0, 0] = 1
    maps.requires_grad_(True)
    loss = loss_of(method, Attention((maps,)), hand_made())
    assert math.isfinite(float(loss.total.detach()))
    assert all(type(term) is float and math.isfinite(term) for term in loss.terms.values())
    assert torch.isfinite(torch.autograd.grad(loss.total, maps)[0]).all()


@each_method
def test_a_whole_run_is_guided_traced_and_reopened(method: Any, tmp_path: Any) -> None:
    if hasattr(method, "refine"):
        method = replace(method, refine=((0.0, 2.0, 2),))  # more than there can be, so both tries are made
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=5, steps=4, record=False, progress=False)
    run = generate(pipe, PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert run.label == method.name
    assert frame.index.tolist() == [0, 1]
    assert frame.refinements.tolist() == [2 if hasattr(method, "refine") else 0, 0]
    assert not frame.skipped.any()
    assert np.isfinite(frame.loss).all()
    assert (frame.moved > 0).all()
    assert np.any(np.asarray(run.image) != np.asarray(plain.image))
    run.save(tmp_path / "run")
    assert open_run(tmp_path / "run").guidance.to_frame().loss.tolist() == frame.loss.tolist()


def test_syngen_leaves_a_prompt_without_attributes_alone() -> None:
    prompt = parse("a [car] and a [bird]", tiny_pipeline())
    assert SynGen().plan([1.0] * 50, prompt) == []
    assert len(SynGen(lone_nouns=True).plan([1.0] * 50, prompt)) == 25


# -- schedules and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "refined"),
    [
        (AttendAndExcite(), {0: (20, 0.95), 10: (20, 0.5), 20: (20, 0.2)}),
        (DivideAndBind(), {0: (50, -0.05), 10: (20, -0.2), 20: (20, -0.3)}),
        (SynGen(), {}),
        (EBAMA(), {}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_plan_is_the_authors_at_fifty_steps_and_in_proportion_at_others(
    method: Any, refined: dict[int, tuple[int, float]]
) -> None:
    plan = method.plan([1.0] * 50, hand_made())
    falls = bool(refined)
    guided = 26 if isinstance(method, EBAMA) else 25  # EBAMA's code guides while the step index is at most 25
    assert [u.size for u in plan] == pytest.approx([20 * math.sqrt(1 - falls * i / 98) for i in range(guided)])
    assert {i: (u.repeats, u.until) for i, u in enumerate(plan) if u.repeats} == {
        i: (tries, pytest.approx(until)) for i, (tries, until) in refined.items()
    }
    tenth = method.plan([1.0] * 10, hand_made())
    assert len(tenth) == 5
    assert [i for i, u in enumerate(tenth) if u.repeats] == [i // 5 for i in refined]


@each_method
def test_layers_of_the_chosen_size_are_read(method: Any) -> None:
    layers = adapter_for(tiny_pipeline()).layers()
    assert {layer.factor for layer in method.select(layers, (8, 8))} == {1}
    finer = {1} if isinstance(method, DivideAndBind) else set()  # of attributes
    assert {layer.factor for layer in replace(method, size=4).select(layers, (8, 8))} == {2} | finer
    if finer:
        assert {layer.factor for layer in replace(method, size=4, binding=()).select(layers, (8, 8))} == {2}


# -- Attend-and-Excite against diffusers -------------------------------------------------------------------------------

Taken = tuple[torch.Tensor, float, torch.Tensor]  # latent before an update, its loss, latent after


def of_ours(pipe: Any, method: AttendAndExcite, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[Taken]:
    """Every update of a guided run of elakit."""
    seen: list[tuple[int, torch.Tensor, float]] = []
    ends: dict[int, torch.Tensor] = {}
    move = Guide.move

    def watched(*args: Any, **options: Any) -> Any:
        losses, grad = gradient(*args, **options)
        seen.append((options["step"], args[4].clone(), float(losses[0].total.detach())))
        return losses, grad

    def moving(guide: Guide, latents: torch.Tensor, step: int, timestep: torch.Tensor) -> torch.Tensor:
        ends[step] = move(guide, latents, step, timestep)
        return ends[step]

    with monkeypatch.context() as patch:
        patch.setattr("elakit.guidance.engine.gradient", watched)
        patch.setattr(Guide, "move", moving)
        generate(pipe, PAIR, seed=5, steps=steps, guidance_scale=3, guidance=method, record=False, progress=False)
    following = [*seen[1:], (-1, None, None)]
    return [
        (z, loss, after if at == step else ends[step])
        for (step, z, loss), (at, after, _) in zip(seen, following, strict=True)
    ]


def of_diffusers(pipe: Any, steps: int, tries: int = 20, **options: Any) -> list[Taken]:
    """Every update of a run of diffusers' pipeline from the same noise; `tries` is fixed to 20 inside it."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
    parts = {name: getattr(pipe, name) for name in names}
    their: Any = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    their.set_progress_bar_config(disable=True)
    taken: list[Taken] = []
    update = their._update_latent

    def watched(latents: torch.Tensor, loss: torch.Tensor, step_size: float) -> torch.Tensor:
        moved = update(latents, loss, step_size)
        taken.append((latents.detach(), float(loss.detach()), moved.detach()))
        return moved

    their._update_latent = watched
    their._perform_iterative_refinement_step = partial(
        their._perform_iterative_refinement_step, max_refinement_steps=tries
    )
    adapter, prompt = adapter_for(pipe), parse(PAIR, pipe)
    conditioning = adapter.encode(prompt.text, guided=True)
    their(
        prompt=None,
        token_indices=[entity.token_indices[0] for entity in prompt.entities],
        latents=adapter.noise(torch.Generator().manual_seed(5), 32, 32),
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=3,
        attn_res=(8, 8),
        output_type="latent",
        **conditioning.call,
        **options,
    )
    return taken


def assert_same(ours: list[Taken], theirs: list[Taken]) -> None:
    # theirs smooths with a kernel in single precision, whatever the model's
    for (z, loss, moved), (their_z, their_loss, their_moved) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(z, their_z, rtol=0, atol=1e-7)
        assert loss == pytest.approx(their_loss, abs=1e-8)
        torch.testing.assert_close(moved, their_moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("scale", "refined"), [(20.0, False), (1.0, True)])
def test_attend_and_excite_moves_the_latent_as_diffusers_does(
    scale: float, refined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DDIM does not scale the model's input; the threshold is out of reach, so that all tries are made
    pipe = tiny_pipeline(torch.float64)
    method = AttendAndExcite(
        step_size=scale, guided=0.5, size=8, refine=((0.0, 0.9999, 3), (0.25, 0.9999, 3)) if refined else ()
    )
    ours = of_ours(pipe, method, 4, monkeypatch)
    theirs = of_diffusers(
        pipe, 4, 3, scale_factor=scale, max_iter_to_alter=2, thresholds={0: 0.9999, 1: 0.9999} if refined else {}
    )
    assert len(ours) == (8 if refined else 2)
    assert float((ours[0][0] - ours[-1][2]).abs().max()) > 1e-3
    assert_same(ours, theirs)


def test_refinement_ends_at_its_threshold_where_diffusers_takes_one_step_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(torch.float64)
    free = AttendAndExcite(step_size=0.05, size=8, refine=((0.0, 1.0, 4),))
    losses = [loss for _, loss, _ in of_ours(pipe, free, 2, monkeypatch)]
    assert losses == sorted(losses, reverse=True)
    least = 1 - (losses[1] + losses[2]) / 2  # reached by the second step
    ours = of_ours(pipe, replace(free, refine=((0.0, least, 20),)), 2, monkeypatch)
    theirs = of_diffusers(pipe, 2, scale_factor=0.05, max_iter_to_alter=1, thresholds={0: least})
    assert len(ours) == 3  # two, and the one that follows
    assert len(theirs) == 4
    assert_same(ours, theirs[:3])
