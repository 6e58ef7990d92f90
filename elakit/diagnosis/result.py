"""The result of `elakit.diagnose`, and its conversion to JSON and to a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elakit.diagnosis import commands
from elakit.diagnosis.data import DiagnosisData
from elakit.diagnosis.remedies import bleed
from elakit.diagnosis.sentences import statements
from elakit.diagnosis.store import read_fields, write_diagnosis
from elakit.rewording import bracketed

# Version of `Diagnosis.to_dict`; raised when a name is removed or changes its meaning.
SCHEMA = 1


@dataclass(frozen=True)
class Diagnosis(DiagnosisData):
    """The result of `elakit.diagnose`: images of one prompt, their failures and causes, and remedies.

    The attributes are those of `elakit.diagnosis.data.DiagnosisData`.
    """

    def to_dict(self) -> dict[str, Any]:
        """Convert the diagnosis to a dictionary for JSON. Images and maps are left out.

        Returns
        -------
        dict
            Values for JSON; unknown numbers are None. ``docs/howto/diagnose.md`` lists the keys.

        Examples
        --------
        The only remedy in this example is "ela", the default guidance method:

        >>> import elakit
        >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=[0], steps=2)
        >>> values = found.to_dict()
        >>> values["prompt"]["bracketed"], values["remedies"][0]["name"]
        ('a [cat] and a [lion]', 'ela')
        """
        from elakit import __version__

        settings = self.pairs[0].plain.settings
        best = self.best
        low, high = self.interval
        return {
            "schema": SCHEMA,
            "elakit": __version__,
            "prompt": {
                "text": self.prompt.text,
                "bracketed": bracketed(self.prompt),
                "entities": [
                    {"label": e.label, "text": e.text, "noun": e.noun, "attributes": list(e.attributes)}
                    for e in self.prompt.entities
                ],
            },
            "settings": dict(settings) | {"seeds": [pair.seed for pair in self.pairs]},
            "judged": self.judged,
            "statements": statements(self),
            "plain": {
                "images": len(self.pairs),
                "right": self.right if self.judged else None,
                "rate": self.rate if self.judged else None,
                "interval": [low, high] if self.judged else None,
                "bleed": bleed(self.plain),
            },
            "method": {"name": self.method, "options": self.options},
            "seeds": self._seeds(),
            "findings": None if self.findings is None else self.findings.to_dict(),
            "remedies": [
                {"rank": rank, **result.to_dict(), **commands.reproduce(result)}
                for rank, result in enumerate(self.remedies, start=1)
            ],
            "best": None if best is None else best.remedy.name,
            "problems": list(self.problems),
            "code": commands.code(self),
            "command": commands.command(self),
            "seconds": self.seconds,
        }

    def save(self, folder: str | Path) -> Path:
        """Store the diagnosis in a folder: first the runs, then ``diagnosis.json``.

        Parameters
        ----------
        folder : str or Path
            A new folder, or a folder that already contains a diagnosis. Runs in the folder are kept, and an existing
            ``diagnosis.json`` is replaced.

        Returns
        -------
        Path
            The folder, which `elakit.open_diagnosis` reads.

        Raises
        ------
        OutputError
            The folder contains files that do not belong to a diagnosis, or cannot be written to.
        """
        return write_diagnosis(self, self.to_dict(), folder)

    def _seeds(self) -> list[dict[str, Any]]:
        """One dictionary of values for JSON per seed.

        The dictionary contains the row of `to_frame`, with the outcome and the measures of the seed. The key
        "predicted_failure" is added: the predicted probability that the plain image fails, or None.
        """
        rows = []
        for row in self.to_frame().reset_index().to_dict("records"):
            plain = {str(name): None if _unknown(value) else value for name, value in row.items()}
            rows.append(plain | {"predicted_failure": self.predicted.get(int(row["seed"]))})
        return rows


def open_diagnosis(folder: str | Path) -> Diagnosis:
    """Open a diagnosis that `Diagnosis.save` wrote.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    Diagnosis

    Raises
    ------
    OutputError
        The folder contains no finished diagnosis, or a run is missing.

    Examples
    --------
    >>> import elakit
    >>> from tempfile import TemporaryDirectory
    >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=[0], steps=2)
    >>> with TemporaryDirectory() as folder:
    ...     again = elakit.open_diagnosis(found.save(folder))
    ...     again.to_dict() == found.to_dict()
    True
    """
    return Diagnosis(**read_fields(folder))


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
