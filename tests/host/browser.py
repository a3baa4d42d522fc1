"""ComfyUI's page in a headless Chromium, driven through selenium (a test dependency, like the browser)."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server import Server

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=1600,1000",
)

DROP = """
const [name, data, done] = arguments;
const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
const file = new File([bytes], name, {type: name.endsWith('.json') ? 'application/json' : 'image/png'});
const transfer = new DataTransfer();
transfer.items.add(file);
const canvas = document.getElementById('graph-canvas');
const at = {bubbles: true, cancelable: true, clientX: 400, clientY: 300, dataTransfer: transfer};
canvas.dispatchEvent(new DragEvent('dragover', at));
canvas.dispatchEvent(new DragEvent('drop', at));
done(true);
"""

QUEUE = """
const done = arguments[arguments.length - 1];
const api = window.app.api;
const seen = {};
function finish(kind) { return e => { seen.kind = kind; seen.detail = e.detail; done(seen); }; }
api.addEventListener('execution_success', finish('success'));
api.addEventListener('execution_error', finish('error'));
window.app.queuePrompt(0).then(() => {
  // The page answers "false" for prompts that were taken too: what it knows of the nodes decides.
  const errors = window.app.lastNodeErrors || {};
  if (Object.keys(errors).length) { seen.kind = 'refused'; seen.detail = errors; done(seen); }
});
"""


def _program(variable: str, *names: str) -> str | None:
    if os.environ.get(variable):
        return os.environ[variable]
    return next((found for name in names if (found := shutil.which(name))), None)


def find_browser() -> str | None:
    """None where a browser test can run, else what is missing."""
    if importlib.util.find_spec("selenium") is None:
        return "browser tests need selenium: pip install selenium"
    if _program("CHROMIUM", "chromium", "chromium-browser", "google-chrome") is None:
        return "browser tests need Chromium (or $CHROMIUM)"
    if _program("CHROMEDRIVER", "chromedriver") is None:
        return "browser tests need chromedriver (or $CHROMEDRIVER)"
    return None


class Browser:
    """The page of a running server. `profile` is a new, empty folder."""

    def __init__(self, server: Server, profile: Path) -> None:
        self.server, self.profile = server, profile

    def __enter__(self) -> Browser:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        from selenium.webdriver.support.ui import WebDriverWait

        # Without this the page opens its tutorial and the template browser over the canvas.
        self.server.post("/settings/Comfy.TutorialCompleted", True)
        options = webdriver.ChromeOptions()
        options.binary_location = _program("CHROMIUM", "chromium", "chromium-browser", "google-chrome")
        for flag in (*FLAGS, f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        environment = dict(os.environ, NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")
        service = Service(_program("CHROMEDRIVER", "chromedriver"), env=environment, log_output=subprocess.DEVNULL)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(300)
        self.driver.set_page_load_timeout(180)
        self.driver.get(self.server.url)
        ready = "const app = window.app; return !!(app?.graph && app.extensionManager && app.canvas)"
        WebDriverWait(self.driver, 180).until(lambda driver: driver.execute_script(ready))
        known = "return Object.keys(window.LiteGraph.registered_node_types).some(t => t.startsWith('TruePose'))"
        WebDriverWait(self.driver, 180).until(lambda driver: driver.execute_script(known))
        return self

    def __exit__(self, *exc: object) -> None:
        self.driver.quit()

    def script(self, code: str, *args: object) -> object:
        """Run JavaScript in the page; `return` gives the result."""
        return self.driver.execute_script(code, *args)

    def drop(self, file: Path, wait_for_node: str | None = None) -> None:
        """Drop a file on the canvas, as a user does; wait until a node of that type is in the graph."""
        from selenium.webdriver.support.ui import WebDriverWait

        data = base64.b64encode(file.read_bytes()).decode()
        self.driver.execute_async_script(DROP, file.name, data)
        if wait_for_node is not None:
            find = "return window.app.graph._nodes.some(n => n.type === arguments[0])"
            WebDriverWait(self.driver, 60).until(lambda d: d.execute_script(find, wait_for_node))

    def node_types(self) -> list[str]:
        """The types of the nodes in the graph."""
        return self.script("return window.app.graph._nodes.map(n => n.type)")

    def api_prompt(self) -> dict:
        """What the page would send to /prompt."""
        code = "const done = arguments[0]; window.app.graphToPrompt().then(p => done(p.output));"
        return self.driver.execute_async_script(code)

    def queue(self) -> dict:
        """Press Run and wait: {"kind": "success" | "error" | "refused", "detail": ...}."""
        return self.driver.execute_async_script(QUEUE)

    def console(self) -> list[str]:
        """Lines of the browser's console, level first."""
        return [f"{line['level']} {line['message']}" for line in self.driver.get_log("browser")]

    def screenshot(self, file: Path) -> None:
        self.driver.save_screenshot(str(file))
