"""Drives Firefox by Marionette, its own protocol for tests, without a driver program beside it.

Protocol: messages [type, id, name or error, content], each behind its length
(https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html).
"""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)


KEYS = {"Control": "\ue009", "Enter": "\ue007"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # under which WebDriver names one

# A script of the page, which a blob may be, and how its value comes out.
AS_MODULE = """let told;
try {
  const value = (%s);
  told = { value: await (typeof value === "function" ? value() : value) };
} catch (error) {
  told = { error: String(error) };
}
document.dispatchEvent(new CustomEvent("told", { detail: JSON.stringify(told) }));"""
RUN_MODULE = """const element = document.createElement("script");
element.type = "module";
element.src = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
return new Promise((resolve) => {
  document.addEventListener("told", (event) => resolve(event.detail), { once: true });
  document.head.append(element);
});"""
# Errors of scripts and of the policy, and what was written to the console: of pages at an address.
ERRORS = """return Services.console.getMessageArray().filter((m) => m instanceof Ci.nsIScriptError)
  .filter((m) => m.sourceName.includes(arguments[0])).map((m) => m.errorMessage)"""
WRITTEN = """const { classes, interfaces } = Components;
return classes["@mozilla.org/consoleAPI-storage;1"].getService(interfaces.nsIConsoleAPIStorage).getEvents()
  .filter((e) => e.filename.includes(arguments[0])).map((e) => `${e.level}: ${e.arguments.join(" ")}`)"""
NARROW = """const shown = window.gBrowser.selectedBrowser;
shown.fullZoom = shown.clientWidth / arguments[0];"""


class Firefox:
    """A Firefox without a window, with a profile of its own; its page by names of Playwright's."""

    def __init__(self, folder: Path, locale: str = "en-US") -> None:
        assert FIREFOX
        profile = folder / "profile"
        profile.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"marionette.port": port, "intl.accept_languages": locale}
        lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in settings.items()]
        (profile / "user.js").write_text("".join(lines))
        self.process = subprocess.Popen(
            [FIREFOX, "--headless", "--marionette", "--remote-allow-system-access", "--no-remote", "--profile",
             str(profile)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.count = 0
        self.connection = self._connect(port)
        self._read()  # its greeting
        self.ask("WebDriver:NewSession", {})
        self.ask("WebDriver:SetTimeouts", {"script": 300_000})

    def _connect(self, port: int) -> socket.socket:
        for _ in range(300):
            try:
                return socket.create_connection(("127.0.0.1", port))
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("Firefox does not listen")

    def _read(self) -> Any:
        digits = b""
        while not digits.endswith(b":"):
            digits += self.connection.recv(1)
        left, content = int(digits[:-1]), b""
        while len(content) < left:
            content += self.connection.recv(left - len(content))
        return json.loads(content)

    def ask(self, name: str, values: dict[str, Any]) -> Any:
        """Send a command and return its answer."""
        self.count += 1
        message = json.dumps([0, self.count, name, values]).encode()
        self.connection.sendall(str(len(message)).encode() + b":" + message)
        _, _, error, content = self._read()
        assert error is None, error
        return content

    def open(self, url: str) -> None:
        self.ask("WebDriver:Navigate", {"url": url})

    def run(self, script: str) -> Any:
        """Run the body of a function in the page and return what it returns, waited for."""
        content = {"script": f"return (async () => {{ {script} }})()", "args": []}
        return self.ask("WebDriver:ExecuteScript", content)["value"]

    def wait(self, selector: str) -> None:
        """Wait until such an element is there."""
        for _ in range(600):
            if self.run(f"return document.querySelector({json.dumps(selector)}) !== null"):
                return
            time.sleep(0.2)
        raise TimeoutError(f"{selector}: {self.run('return document.body.innerText')}")

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression, or of a function, waited for, as the page's own script has it.

        Scripts of WebDriver see what the page made from outside, and its functions not at all.
        """
        told = json.loads(
            self.run(f"const script = {json.dumps(AS_MODULE % script)}; {RUN_MODULE}")
        )
        assert "error" not in told, told["error"]
        return told.get("value")

    def wait_for_selector(self, selector: str, timeout: int = 0) -> None:
        self.wait(selector)

    def click(self, selector: str) -> None:
        found = self.ask("WebDriver:FindElement", {"using": "css selector", "value": selector})
        self.ask("WebDriver:ElementClick", {"id": found["value"][ELEMENT]})

    def fill(self, selector: str, text: str) -> None:
        self.run(
            f"const field = document.querySelector({json.dumps(selector)}); field.focus();"
            f" field.value = {json.dumps(text)}; field.dispatchEvent(new Event('input', {{ bubbles: true }}));"
        )

    def press(self, keys: str) -> None:
        """Press keys such as Control+Enter where the focus is."""
        focus = self.ask("WebDriver:GetActiveElement", {})["value"][ELEMENT]
        text = "".join(KEYS[key] for key in keys.split("+"))
        self.ask("WebDriver:ElementSendKeys", {"id": focus, "text": text})

    def inner_text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({json.dumps(selector)}).innerText"))

    def is_visible(self, selector: str) -> bool:
        return bool(
            self.run(
                f"return document.querySelector({json.dumps(selector)}).getClientRects().length > 0"
            )
        )

    def complaints(self, url: str) -> list[str]:
        """Return what pages at this address complained of."""
        script = {"script": WRITTEN, "args": [url], "sandbox": "system"}
        return [
            *self._run_within(ERRORS, url),
            *self.ask("WebDriver:ExecuteScript", script)["value"],
        ]

    def narrow(self, width: int) -> None:
        """Make the page so many pixels wide, by zoom: no window is narrower than 500."""
        self.ask("WebDriver:SetWindowRect", {"width": 500, "height": 1000})
        self._run_within(NARROW, width)

    def _run_within(self, script: str, argument: Any) -> Any:
        """Run a script in the browser's own window."""
        self.ask("Marionette:SetContext", {"value": "chrome"})
        told = self.ask("WebDriver:ExecuteScript", {"script": script, "args": [argument]})
        self.ask("Marionette:SetContext", {"value": "content"})
        return told["value"]

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
