"""Choices of a panel's user for the next run, and the actions that change them; nothing here depends on widgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from elakit.checks import is_whole, real_number, whole_number
from elakit.errors import ElakitError, SettingError
from elakit.guidance import METHODS, Method, option_values
from elakit.guidance.layout import Box, Layout, Region, check_layout
from elakit.guidance.method import check_method
from elakit.numbering import plural
from elakit.prompt import Entity, Prompt
from elakit.widgets.live import options, words
from elakit.widgets.live.options import REGIONS

PLAIN = "plain"
LARGEST_SEED = 2**53 - 1  # the largest whole number that a browser represents exactly
MOST_STEPS = 1000  # of elakit.generate
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "seed": lambda value: whole_number(value, "seed", 0, LARGEST_SEED),
    "steps": lambda value: whole_number(value, "steps", 1, MOST_STEPS),
    "guidance_scale": lambda value: real_number(value, "guidance_scale", 0),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """Choices of a panel's user for the next run.

    Actions, such as `with_method`, return new choices, or the same object if nothing changes. "Method" stands for the
    guidance method.

    Attributes
    ----------
    seed, steps, guidance_scale : int, int, float
        Numbers as entered, which may be out of range (`elakit.widgets.live.next_run.problems` finds those that are).
    text : str
        Text of the prompt, as entered.
    prompt : Prompt or None
        The parsed prompt; None if no text was entered yet, or if it cannot be parsed.
    unreadable : ElakitError or None
        The error that parsing the text raised; None if there was none.
    method : str
        "plain" or a key of `elakit.guidance.METHODS`.
    entries : mapping of str to mapping
        For each method by name, the entries of its options by name (an entry is the content of an option's input field,
        see `elakit.widgets.live.options.entry`). A method that is not in the mapping has its default options.
    by_hand : mapping of str to region
        Regions given by hand, by label of the entity. A region is a box (left, top, right, bottom) as fractions of the
        image, or a boolean mask (y, x). If an entity is removed from the prompt, its region is kept and used again if
        an entity with the same label returns.

    Examples
    --------
    The car gets the left half of the image as its region:

    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> choices = Choices(seed=0, steps=4, guidance_scale=3.0).with_prompt(prompt).with_method("boxdiff")
    >>> choices.with_region("car", (0, 0, 0.5, 1)).regions()
    {'car': (0.0, 0.0, 0.5, 1.0), 'bird': None}

    The word with the index 1, "red", is an attribute; a click on it removes it from the attributes of the car:

    >>> choices.with_word_toggled(1).prompt.entities[0].attributes
    ()
    """

    seed: int
    steps: int
    guidance_scale: float
    text: str = ""
    prompt: Prompt | None = None
    unreadable: ElakitError | None = None
    method: str = PLAIN
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_hand: Mapping[str, Region] = field(default_factory=dict)

    # -- actions ---------------------------------------------------------------------------------------------------

    def with_text(self, text: str, read: Callable[[str], Prompt]) -> Choices:
        """Set the text of the prompt and parse it with `read`; an error of `read` is kept in `unreadable`.

        If the text equals ``prompt.text``, which has no brackets, the prompt is kept, with the entities and attributes
        that the user has assigned by clicking on words. With any other text, these assignments are lost.
        """
        if self.prompt is not None and self.prompt.text == text:
            return self if self.text == text else replace(self, text=text)
        try:
            return replace(self.with_prompt(read(text)), text=text)
        except ElakitError as error:
            return replace(self, text=text, prompt=None, unreadable=error)

    def with_prompt(self, prompt: Prompt) -> Choices:
        """Set a parsed prompt; `text` becomes its text, which has no brackets."""
        return replace(self, text=prompt.text, prompt=prompt, unreadable=None)

    def with_word_toggled(self, at: int) -> Choices:
        """Change the role of the word with the index `at`, counted from 0: from none to entity, to attribute, to none.

        See `elakit.widgets.live.words.toggled`. Nothing changes if there is no prompt.

        Raises
        ------
        PromptError
            No entity would be left, or the tokenizer has no separate token for the word.
        """
        return self if self.prompt is None else replace(self, prompt=words.toggled(self.prompt, at))

    def with_number(self, name: str, value: float) -> Choices:
        """Set a number to an entered value, which is not checked here."""
        entered: dict[str, Any] = {name: value}
        return self if getattr(self, name) == value else replace(self, **entered)

    def with_method(self, name: str) -> Choices:
        """Choose a method by name; options that were entered for this method before are restored.

        Raises
        ------
        SettingError
            There is no such method.
        """
        if name not in (PLAIN, *METHODS):
            raise SettingError(f"method={name!r}: choose one of {', '.join(map(repr, (PLAIN, *METHODS)))}.")
        return self if name == self.method else replace(self, method=name)

    def with_entry(self, method: str, option: str, entry: Any) -> Choices:
        """Set an option of a method to an entered value, which is not checked here."""
        entered = self.entries_of(method)
        return self if entered[option] == entry else self._with_entries(method, {**entered, option: entry})

    def with_options(self, given: Mapping[str, Any]) -> Choices:
        """Set the given options of the chosen method; its other options keep their values.

        Raises
        ------
        SettingError
            The method has no such option, a value has the wrong type, or "regions" is among the options: regions are
            set with `with_region`.
        """
        if REGIONS in given and self.takes_regions:
            raise SettingError(
                f"{self.method}: regions are not set as an option of the panel. Draw them on the image, or call "
                "panel.draw(entity, region) for each entity."
            )
        kind = None if self.method == PLAIN else METHODS[self.method]
        there = {} if kind is None else {option.name: option for option in options.options(kind)}
        if unknown := sorted(given.keys() - there.keys()):
            known = f"its options are {', '.join(there)}" if there else "it has no options"
            raise SettingError(
                f"{self.method} has no {plural('option', len(unknown))} {', '.join(map(repr, unknown))}; {known}."
            )
        if kind is None or not given:
            return self
        entries = {name: options.entry(kind, there[name], value) for name, value in given.items()}
        return self._with_entries(self.method, {**self.entries_of(self.method), **entries})

    def with_defaults(self, method: str) -> Choices:
        """Restore the default options of a method."""
        return self._with_entries(method, options.defaults(METHODS[method]))

    def with_guidance(self, guidance: Method) -> Choices:
        """Choose a method and its options, except its regions, which belong to entities of a prompt (`with_region`).

        Raises
        ------
        SettingError
            The method is not among `elakit.guidance.METHODS`, or one of its options has the wrong type.
        """
        if METHODS.get(check_method(guidance).name) is not type(guidance):
            raise SettingError(
                f"guidance={guidance!r}: the panel supports {', '.join(METHODS)}, and None for a plain run. Register "
                "a method of your own under its name, such as elakit.guidance.METHODS['my-method'] = MyMethod."
            )
        given = {name: value for name, value in option_values(guidance).items() if name != REGIONS}
        return self.with_method(guidance.name).with_options(given)

    def with_region(self, entity: str | int | Entity, region: Region | None) -> Choices:
        """Set the region that is given by hand for an entity; None removes this region.

        `entity` is the label of the entity, its index counted from 0, or the `Entity` itself.

        Raises
        ------
        SettingError
            There is no such entity, or the region is not valid.
        """
        label = self._label(entity)
        checked = None if region is None else check_layout([region], f"draw({label!r}, ...)")[0]
        return self._with_regions({label: checked})

    def with_boxes(self, boxes: Sequence[Box | None]) -> Choices:
        """Take over the boxes that the user has drawn on the image, one per entity; None removes the box of an entity.

        A box replaces a mask that was given for the entity; None keeps the mask. Nothing changes if the number of boxes
        differs from the number of entities.
        """
        regions = self.regions()
        if len(boxes) != len(regions):
            return self
        changes: dict[str, Region | None] = {}
        for (label, before), shown in zip(regions.items(), boxes, strict=True):
            box = None if shown is None else (shown[0], shown[1], shown[2], shown[3])
            masked = isinstance(before, np.ndarray)
            if box is not None and (masked or before != box):
                changes[label] = box
            elif box is None and before is not None and not masked:
                changes[label] = None
        return self._with_regions(changes) if changes else self

    def without_regions(self) -> Choices:
        """Remove the regions that were given by hand for the entities of the prompt."""
        return self._with_regions(dict.fromkeys(self.regions()))

    # -- what is chosen ------------------------------------------------------------------------------------------------

    @property
    def takes_regions(self) -> bool:
        """True if the chosen method can use regions given by hand."""
        return self.method != PLAIN and METHODS[self.method].takes_regions

    @property
    def needs_regions(self) -> bool:
        """True if the chosen method needs a region given by hand for each entity."""
        return self.method != PLAIN and METHODS[self.method].needs_regions

    def regions(self) -> dict[str, Region | None]:
        """Region given by hand for each entity of the prompt, by label of the entity; None where no region is given."""
        entities = self.prompt.entities if self.prompt is not None else ()
        return {entity.label: self.by_hand.get(entity.label) for entity in entities}

    def layout(self) -> Layout | None:
        """Regions given by hand, in the order of the entities, with None for each entity without a region.

        None instead of the whole layout if no entity has a region.
        """
        regions = tuple(self.regions().values())
        return None if all(region is None for region in regions) else regions

    def entries_of(self, method: str) -> Mapping[str, Any]:
        """Entries of all options of a method, by name of the option: those that were entered, or the defaults."""
        return self.entries[method] if method in self.entries else options.defaults(METHODS[method])

    def options(self) -> dict[str, Any]:
        """Values of the chosen method's options by name, without its regions.

        Raises
        ------
        SettingError
            The text that was entered for an option is not a Python literal.
        """
        return {} if self.method == PLAIN else options.values(METHODS[self.method], self.entries_of(self.method))

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _with_entries(self, method: str, entries: Mapping[str, Any]) -> Choices:
        return replace(self, entries={**self.entries, method: entries})

    def _with_regions(self, changes: Mapping[str, Region | None]) -> Choices:
        regions = {**self.by_hand, **changes}
        return replace(self, by_hand={label: region for label, region in regions.items() if region is not None})

    def _label(self, entity: str | int | Entity) -> str:
        labels = list(self.regions())
        if is_whole(entity) and 0 <= entity < len(labels):
            return labels[entity]
        label = entity.label if isinstance(entity, Entity) else entity
        if label not in labels:
            known = ", ".join(map(repr, labels))
            remedy = f"Choose from {known}." if labels else "Enter a prompt that names entities first."
            raise SettingError(f"draw({label!r}, ...): the prompt has no such entity. {remedy}")
        return str(label)
