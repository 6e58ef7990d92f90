"""Causes in plain words."""

from __future__ import annotations

from elakit.causes.findings import Cause


def sentence(cause: Cause) -> str:
    """One plain sentence that says what a cause is, with the number it rests on.

    Parameters
    ----------
    cause : Cause

    Examples
    --------
    >>> sentence(Cause("captured", "bird", "car", "car", evidence={"held": 0.93}))
    'Where the bird belongs, the image attends to "car" instead (93 % of the attention to the two).'
    """
    entity, other, token, n = cause.entity, cause.other, cause.token, cause.evidence
    match cause.kind:
        case "ambiguous word" if n.get("unknown"):
            return f'The model was never shown a "{entity}": it does not know what to draw.'
        case "ambiguous word":
            return f'The text encoder has no token for "{entity}" and cuts it into {n.get("pieces", 0):.0f} pieces.'
        case "text states alike":
            return (
                f'To the denoiser "{entity}" and "{other}" are nearly the same word: their text states are alike '
                f"(cosine {n.get('likeness', 0):.2f})."
            )
        case "text leakage":
            return (
                f'The text state of "{entity}" carries "{token}", which was said of the {other}: it lies '
                f'{_percent(n.get("leak", 0))} of the way to that of "{_word(token)} {_word(entity)}".'
            )
        case "token ignored":
            why = "its text state is empty" if "length" in n else "it has next to no attention anywhere"
            return f'The image does not read "{entity}": {why}.'
        case "start-of-text competition":
            return (
                f"Where the {entity} belongs, start-of-text takes the attention "
                f"({_percent(n.get('start_held', 0))} of the attention to the two)."
            )
        case "regions swap":
            when = "midway" if cause.step is None else f"at step {cause.step}"
            return f'"{entity}" and "{other}" change places {when}, when the image has taken shape already.'
        case "captured" if n.get("held", 0) > 0.6:
            return (
                f'Where the {entity} belongs, the image attends to "{token}" instead '
                f"({_percent(n['held'])} of the attention to the two)."
            )
        case "captured":
            return (
                f'"{entity}" and "{other}" are attended to in the same place (overlap '
                f"{_percent(n.get('overlap', n.get('alike', 0)))}), so only one of them can be there."
            )
        case "attribute misplaced":
            return f'"{token}" was said of the {entity}, but the image attends to it where the {other} is.'
        case "never localized":
            return f'"{entity}" is attended to a little everywhere, so it has no place of its own.'
        case "region split":
            return f'"{entity}" is attended to in two places that lie apart, so that it is split or drawn twice.'


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _word(label: str) -> str:
    """A label as the word it stands for: "red#2" -> "red"."""
    return label.partition("#")[0]
