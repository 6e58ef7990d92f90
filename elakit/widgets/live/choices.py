"""Choices that the user of the live panel makes for the next run, and the actions that change these choices.

Nothing in this module depends on widgets.
"""

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
    """Choices that the user of the live panel makes for the next run.

    A `Choices` object never changes. An action, such as `with_method`, returns an object with the changed choice.
    "Method" always means the guidance method.

    Attributes
    ----------
    seed, steps, guidance_scale : int, int, float
        Numbers as entered. They may be out of range; `elakit.widgets.live.next_run.problems` reports such numbers.
    text : str
        Text of the prompt, as entered.
    prompt : Prompt or None
        The parsed prompt; None if no text was entered yet, or if the text cannot be parsed.
    unreadable : ElakitError or None
        The error that parsing the text raised; None if there was none.
    method : str
        "plain" or a key of `elakit.guidance.METHODS`.
    entries : mapping of str to mapping
        For each method, by name, a mapping from option names to entries. An entry is the content of the option's input
        field. A method that is not in the outer mapping has its default options.
    by_hand : mapping of str to region
        Regions given by hand, by label of the entity. A region is a box (left, top, right, bottom) as fractions of the
        image, or a boolean mask (y, x). The region of an entity that is removed from the prompt is kept. The region is
        used again when an entity with the same label returns.

    Examples
    --------
    The car gets the left half of the image as its region:

    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> choices = Choices(seed=0, steps=4, guidance_scale=3.0).with_prompt(prompt).with_method("boxdiff")
    >>> choices.with_region("car", (0, 0, 0.5, 1)).regions()
    {'car': (0.0, 0.0, 0.5, 1.0), 'bird': None}

    The word with the index 1 is "red", the only attribute of the car. A click on "red" removes this attribute:

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
        """Set the text of the prompt, and parse the text with `read`.

        If `read` raises an `ElakitError`, the error is stored in `unreadable`.

        A text that equals ``prompt.text`` is not parsed again. The prompt then keeps the entities and attributes that
        the user has assigned by clicking on words. With any other text, these assignments are lost.
        """
        if self.prompt is not None and self.prompt.text == text:
            return self if self.text == text else replace(self, text=text)
        try:
            return replace(self.with_prompt(read(text)), text=text)
        except ElakitError as error:
            return replace(self, text=text, prompt=None, unreadable=error)

    def with_prompt(self, prompt: Prompt) -> Choices:
        """Set a parsed prompt, and set `text` to ``prompt.text``."""
        return replace(self, text=prompt.text, prompt=prompt, unreadable=None)

    def with_word_toggled(self, at: int) -> Choices:
        """Change the role of a word as a click on the word does.

        A word without a role becomes an entity, an entity becomes an attribute, and an attribute loses its role. `at`
        is the index of the word in the prompt, counted from 0. Nothing changes if there is no prompt.
        `elakit.widgets.live.words.toggled` explains which entity the new attribute belongs to.

        Raises
        ------
        PromptError
            No entity would be left, or the tokenizer has no separate token for the word.
        """
        return self if self.prompt is None else replace(self, prompt=words.toggled(self.prompt, at))

    def with_number(self, name: str, value: float) -> Choices:
        """Set "seed", "steps" or "guidance_scale" to an entered value, which is not checked here."""
        entered: dict[str, Any] = {name: value}
        return self if getattr(self, name) == value else replace(self, **entered)

    def with_method(self, name: str) -> Choices:
        """Choose a guidance method by name, or "plain".

        Options that were entered for this method before are restored.

        Raises
        ------
        SettingError
            There is no such method.
        """
        if name not in (PLAIN, *METHODS):
            raise SettingError(f"method={name!r}: choose one of {', '.join(map(repr, (PLAIN, *METHODS)))}.")
        return self if name == self.method else replace(self, method=name)

    def with_entry(self, method: str, option: str, entry: Any) -> Choices:
        """Set the entry of a method's option, that is, the content of the option's input field.

        The entry is not checked here.
        """
        entered = self.entries_of(method)
        return self if entered[option] == entry else self._with_entries(method, {**entered, option: entry})

    def with_options(self, given: Mapping[str, Any]) -> Choices:
        """Set some options of the chosen method; the other options keep their values.

        `given` has the new values, by name of the option.

        Raises
        ------
        SettingError
            The method has no such option, or a value has the wrong type. Also raised for the option "regions", since
            regions are set with `with_region`.
        """
        if REGIONS in given and self.takes_regions:
            raise SettingError(
                f"{self.method}: regions cannot be given as an option of the panel. Draw the regions on the image, or "
                "call panel.draw(entity, region) for each entity."
            )
        kind = None if self.method == PLAIN else METHODS[self.method]
        there = {} if kind is None else {option.name: option for option in options.options(kind)}
        if unknown := sorted(given.keys() - there.keys()):
            known = f"choose from {', '.join(there)}" if there else "it has no options"
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
        """Choose the method `guidance` with its options, but without its regions.

        Regions belong to the entities of a prompt. They are set with `with_region`.

        Raises
        ------
        SettingError
            The method is not among `elakit.guidance.METHODS`, or the value of an option has the wrong type.
        """
        if METHODS.get(check_method(guidance).name) is not type(guidance):
            raise SettingError(
                f"guidance={guidance!r}: the panel supports {', '.join(METHODS)}, and None for a plain run. Register "
                "a method of your own under its name, such as elakit.guidance.METHODS['my-method'] = MyMethod."
            )
        given = {name: value for name, value in option_values(guidance).items() if name != REGIONS}
        return self.with_method(guidance.name).with_options(given)

    def with_region(self, entity: str | int | Entity, region: Region | None) -> Choices:
        """Set the region that is given by hand for an entity, or remove the region.

        `entity` is the label of the entity, the index of the entity, counted from 0, or the `Entity` itself. `region`
        is a box (left, top, right, bottom) as fractions of the image, a boolean mask (y, x), or None for no region.

        Raises
        ------
        SettingError
            There is no such entity, or the region is not valid.
        """
        label = self._label(entity)
        checked = None if region is None else check_layout([region], f"draw({label!r}, ...)")[0]
        return self._with_regions({label: checked})

    def with_boxes(self, boxes: Sequence[Box | None]) -> Choices:
        """Set the regions of all entities to the boxes that the user has drawn on the image.

        `boxes` has one item per entity. An item is a box (left, top, right, bottom) as fractions of the image, or None.
        A box replaces the region of its entity. None removes the region if the region is a box, but keeps a mask.
        Nothing changes if the number of items differs from the number of entities.
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
        """Region given by hand for each entity of the prompt, by label; None for an entity without a region."""
        entities = self.prompt.entities if self.prompt is not None else ()
        return {entity.label: self.by_hand.get(entity.label) for entity in entities}

    def layout(self) -> Layout | None:
        """Regions given by hand, one item per entity of the prompt; None if no entity has a region.

        The item of an entity without a region is None.
        """
        regions = tuple(self.regions().values())
        return None if all(region is None for region in regions) else regions

    def entries_of(self, method: str) -> Mapping[str, Any]:
        """Entries of all options of a method, by name of the option.

        An entry is the content of an option's input field. Options that were not entered have their default entry.
        """
        return self.entries[method] if method in self.entries else options.defaults(METHODS[method])

    def options(self) -> dict[str, Any]:
        """Values of the chosen method's options, by name of the option. Regions are not included.

        Raises
        ------
        SettingError
            The text that was entered for a number or a tuple is not a Python literal.
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
