"""Build hook: the wheel contains the notebooks without their outputs, which are fifty times as large."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NotebookHook(BuildHookInterface):
    """Adds ``elakit/_notebooks`` to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the stripped notebooks to a temporary folder and include it; editable installs use the checkout."""
        if version == "editable":
            return
        self.folder = tempfile.TemporaryDirectory()
        for source in sorted(Path(self.root, "notebooks").glob("*.ipynb")):
            target = Path(self.folder.name, source.name)
            target.write_text(strip_outputs(source.read_text(encoding="utf-8")), encoding="utf-8")
            build_data["force_include"][str(target)] = f"elakit/_notebooks/{source.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete the temporary folder."""
        if version != "editable":
            self.folder.cleanup()


def strip_outputs(text: str) -> str:
    """Notebook as JSON text without outputs, execution counts and widget states."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook["metadata"].pop("widgets", None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
