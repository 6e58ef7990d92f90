"""Sentences that describe causes."""

from __future__ import annotations

from elakit.causes.findings import CAPTURED, Cause
from elakit.numbering import step_name
from elakit.tokens import word_of


def sentence(cause: Cause) -> str:
    """One sentence that describes a cause; for some kinds of causes, it states the supporting number.

    Parameters
    ----------
    cause : Cause

    Examples
    --------
    In the region of the bird, "car" receives 93% of the attention to the two nouns ("held"):

    >>> sentence(Cause("captured", "bird", "car", "car", evidence={"held": 0.93}))
    'In the region of the bird, attention goes to "car" (93% of the attention to the two nouns).'
    """
    entity, other, token, n = cause.entity, cause.other, cause.token, cause.evidence
    match cause.kind:
        case "ambiguous word" if n.get("unknown"):
            return f'The noun "{entity}" was not in the training data of the model.'
        case "ambiguous word":
            return f'The tokenizer has no token for "{entity}" and splits it into {n.get("pieces", 0):.0f} pieces.'
        case "text states alike":
            return (
                f'The text embeddings of "{entity}" and "{other}" are nearly the same, so the denoiser can hardly '
                f"distinguish them (cosine {n.get('likeness', 0):.2f})."
            )
        case "text leakage":
            return (
                f'The text encoder mixes "{token}", an attribute of the {other}, into "{entity}": "{token}" moves the '
                f'text embedding of "{entity}" {n.get("leak", 0):.0%} of the way toward the embedding of '
                f'"{word_of(token)} {word_of(entity)}".'
            )
        case "token ignored":
            why = "its text embedding is close to zero" if "length" in n else "it receives almost no attention"
            return f'The denoiser ignores "{entity}": {why}.'
        case "start-of-text competition":
            return (
                f"In the region of the {entity}, attention goes to the start-of-text token rather than to the noun "
                f"(the start-of-text token receives {n.get('start_held', 0):.0%} of the attention to these two)."
            )
        case "regions swap":
            when = "during the run" if cause.step is None else f"at {step_name(cause.step)}"
            return (
                f'The attention to "{entity}" and the attention to "{other}" swap places {when}, after the layout has '
                "formed."
            )
        case "captured":
            return _captured(cause)
        case "attribute misplaced":
            return f'"{token}" describes the {entity}, but much of its attention lies in the region of the {other}.'
        case "never localized":
            return (
                f'The attention to "{entity}" is spread over the whole image, so the {entity} has no region of its own.'
            )
        case "region split":
            return (
                f'The attention to "{entity}" has two separate peaks, so the {entity} may appear in two parts or twice.'
            )


def _captured(cause: Cause) -> str:
    """Sentence for a cause of the kind "captured".

    The number "held" in `Cause.evidence` is the share of attention that another noun receives in the entity's region.
    If "held" exceeds `CAPTURED`, the sentence states this share. Otherwise, the sentence states that the two nouns
    receive attention at the same locations.
    """
    entity, n = cause.entity, cause.evidence
    if n.get("held", 0) > CAPTURED:
        return (
            f'In the region of the {entity}, attention goes to "{cause.token}" '
            f"({n['held']:.0%} of the attention to the two nouns)."
        )
    return (
        f'"{entity}" and "{cause.other}" receive attention at the same locations (overlap '
        f"{n.get('overlap', n.get('alike', 0)):.0%}), where only one of them can appear."
    )
