"""A real JupyterLab on localhost and a headless Chromium that looks at it, for tests and benchmarks.

`open_lab` starts both for a folder of notebooks, and ends both. What JupyterLab would write or look up at home
(settings, workspaces, news, extensions) is in a temporary folder or off, and Chromium resolves no host but localhost::

    with open_lab(folder) as lab:
        notebook = lab.open("first.ipynb")
        notebook.run(timeout=60)
        assert not notebook.errors() and not lab.complaints()
        notebook.page.locator(".elx-play").click()  # a playwright page
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from elakit.lab import HOOK

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
LOCAL = {"localhost", "127.0.0.1"}
# marks of a test file that opens a browser: `pytestmark = lab.MARKS`
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"),
    pytest.mark.skipif(not PLAYWRIGHT, reason="no playwright: pip install playwright"),
]
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/extensionmanager-extension:plugin": {"enabled": False},
    # all cells are in the page, also those that are scrolled out of sight
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
NOTEBOOK = "window.jupyterapp.shell.currentWidget"
READY = """() => {
  const widget = window.jupyterapp?.shell?.currentWidget;
  return widget?.sessionContext?.session?.kernel?.status === "idle" && widget.content.model?.cells.length > 0;
}"""


@dataclass
class Notebook:
    """A notebook that is open in JupyterLab, in a page of its own.

    Attributes
    ----------
    page : playwright.sync_api.Page
    """

    page: Any

    def run(self, timeout: float = 120) -> float:
        """Run all cells, and wait for the last to end; the seconds that took.

        Parameters
        ----------
        timeout : float
            Seconds; playwright's ``TimeoutError`` is raised beyond them.
        """
        begun = time.perf_counter()
        self.page.evaluate(
            """() => {
              window.allRan = false;
              const end = () => { window.allRan = true; };
              window.jupyterapp.commands.execute("notebook:run-all-cells").then(end, end);
            }"""
        )
        self.page.wait_for_function("window.allRan", timeout=1000 * timeout)
        return time.perf_counter() - begun

    def start_cell(self, source: str) -> None:
        """Append a cell, run it, and do not wait for its end (as a cell that blocks does not stop a person's hands)."""
        self.page.evaluate(
            """(source) => {
              const { content: notebook, sessionContext: session } = window.jupyterapp.shell.currentWidget;
              const at = notebook.model.sharedModel.cells.length;
              notebook.model.sharedModel.insertCell(at, { cell_type: "code", source });
              notebook.activeCellIndex = at;
              window.cellRan = false;
              const end = () => { window.cellRan = true; };
              window.jupyterapp.commands.execute("notebook:run-cell").then(end, end);
            }""",
            source,
        )

    def run_cell(self, source: str, timeout: float = 60) -> dict[str, Any]:
        """Append a cell, run it, and give it with its outputs, as nbformat writes them."""
        self.start_cell(source)
        self.page.wait_for_function("window.cellRan", timeout=1000 * timeout)
        cell: dict[str, Any] = self.cells()[-1]
        return cell

    def cells(self) -> list[dict[str, Any]]:
        """All cells as they stand, as nbformat writes them."""
        cells: list[dict[str, Any]] = self.page.evaluate(f"{NOTEBOOK}.content.model.sharedModel.toJSON().cells")
        return cells

    def errors(self) -> list[str]:
        """Errors raised by notebook cells: name and message of each."""
        return [
            f"{output['ename']}: {output['evalue']}"
            for cell in self.cells()
            for output in cell.get("outputs", [])
            if output["output_type"] == "error"
        ]

    def save(self) -> None:
        """Save the notebook."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")

    def close(self) -> None:
        """Shut the kernel down and close the page."""
        self.page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
        self.page.close()


@dataclass
class Lab:
    """A running JupyterLab and the browser that looks at it.

    Attributes
    ----------
    url : str
        Address of the server, with a slash at its end.
    token : str
    folder : pathlib.Path
        Folder that it serves.
    browser : playwright.sync_api.Browser
    console : list of str
        Errors that any page's console showed, and what its scripts raised.
    requests : list of str
        Addresses that any page asked for, web sockets among them.
    """

    url: str
    token: str
    folder: Path
    browser: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def foreign(self) -> list[str]:
        """Requests that would have left localhost."""
        return [url for url in self.requests if urlsplit(url).hostname not in LOCAL]

    def complaints(self) -> list[str]:
        """Console errors and foreign requests; a test asserts that there are none.

        JupyterLab's own complaint about a page that is closed while the kernel still answers is left out.
        """
        console = [text for text in self.console if "Could not restore the debugger state" not in text]
        return [*console, *(f"request to {url}" for url in self.foreign)]

    def open(self, name: str, timeout: float = 120, width: int = 1300, height: int = 1000) -> Notebook:
        """Open a notebook of the folder in a page of its own, and wait until its kernel is idle.

        Parameters
        ----------
        name : str
            Such as "first.ipynb", below the folder.
        timeout : float
            Seconds.
        width, height : int
            Size of the page in pixels.
        """
        page = self.browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: self.console.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda socket: self._note(socket.url))
        page.context.new_cdp_session(page).send("Network.setCacheDisabled", {"cacheDisabled": True})
        page.goto(f"{self.url}lab/tree/{name}?reset&token={self.token}", timeout=1000 * timeout)
        page.wait_for_function(
            READY,
            timeout=1000 * timeout,
        )
        page.evaluate("window.jupyterapp.shell.collapseLeft()")
        return Notebook(page)

    def _note(self, url: str) -> None:
        if not url.startswith(("data:", "blob:", "about:")):
            self.requests.append(url)


@contextmanager
def serve(folder: Path, environment: dict[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """A JupyterLab that serves a folder, as its address and its token.

    Parameters
    ----------
    folder : pathlib.Path
    environment : dict, optional
        Variables that kernels see beside those of this process.

    Raises
    ------
    RuntimeError
        It did not start within a minute; the message has what it said.
    """
    with tempfile.TemporaryDirectory(prefix="lab-") as temporary:
        home = Path(temporary)
        token = secrets.token_hex(16)
        kinds = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
        for kind in kinds:
            (home / kind).mkdir()
        overrides = home / "CONFIG_DIR" / "labconfig" / "default_setting_overrides.json"
        overrides.parent.mkdir()
        overrides.write_text(json.dumps(SETTINGS), encoding="utf-8")
        variables = {
            **os.environ,
            **{f"JUPYTER_{kind}": str(home / kind) for kind in kinds},
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
            "JUPYTER_TOKEN": token,
            "IPYTHONDIR": str(home / "ipython"),
            **(environment or {}),
        }
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
            f"--ServerApp.root_dir={folder}", "--ServerApp.port=0", "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly", "--LabApp.news_url=None", HOOK,
        ]  # fmt: skip
        with (home / "log").open("w") as log:
            # in a session of its own, so that its kernels end with it
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
            try:
                url = _wait(process, home)
                yield url, token
            finally:
                _end(process)


def _wait(process: subprocess.Popen[bytes], home: Path) -> str:
    """The address that the server wrote beside its process id, once it answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for path in (home / "RUNTIME_DIR").glob("jpserver-*.json"):
            try:
                server = json.loads(path.read_text(encoding="utf-8"))
                url = f"http://127.0.0.1:{server['port']}{server['base_url']}"
                urllib.request.urlopen(f"{url}api", timeout=5).close()
            except (OSError, ValueError):
                continue  # half written, or not listening yet
            return url
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(home / 'log').read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def browse() -> Iterator[Any]:
    """A headless Chromium that resolves no host but localhost.

    Yields
    ------
    playwright.sync_api.Browser
    """
    from playwright.sync_api import sync_playwright

    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", nowhere])
        yield browser
        browser.close()


@contextmanager
def open_lab(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Lab]:
    """A JupyterLab of a folder, and a browser to open its notebooks with (see `serve` and `browse`)."""
    with serve(folder, environment) as (url, token), browse() as browser:
        yield Lab(url, token, folder, browser)
