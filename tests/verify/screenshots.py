"""A headless Chromium that opens a page as a phone, a desktop or a printer would, and says what it shows.

By hand:  python tests/verify/screenshots.py PAGE.html FOLDER  leaves a picture of each setting in FOLDER.
"""

import json
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from base64 import b64decode
from math import inf
from pathlib import Path

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
SETTINGS = {  # width, height, colours, medium
    "narrow": (360, 740, "light", "screen"),
    "phone-light": (390, 844, "light", "screen"),
    "phone-dark": (390, 844, "dark", "screen"),
    "desktop-light": (1280, 800, "light", "screen"),
    "desktop-dark": (1280, 800, "dark", "screen"),
    "print": (794, 1123, "dark", "print"),  # printed in light colours, whatever the screen has
}


def chromium():
    """The path of a Chromium or a Chrome, or None; always None where there are no pipes as POSIX has them."""
    if os.name != "posix":
        return None
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Browser:
    """Chromium over its debugging pipe: messages are JSON, each ended by a zero byte."""

    def __init__(self, path, *, seconds=40.0):
        import fcntl  # POSIX only

        self.folder = tempfile.mkdtemp()
        self.end, self.count, self.rest = time.monotonic() + seconds, 0, b""
        to_it, self.out = os.pipe()
        self.inn, from_it = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_it, from_it)]  # clear of 3 and 4
        moves = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        command = [path, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self.pid = os.posix_spawn(path, command, os.environ, file_actions=moves + quiet, setpgroup=0)
        for fd in (to_it, from_it, *high):
            os.close(fd)
        self.session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.out)
        os.close(self.inn)
        os.killpg(self.pid, signal.SIGKILL)  # the group that this class started
        os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _message(self):
        while b"\0" not in self.rest:
            left = self.end - time.monotonic()
            if left <= 0 or not select.select([self.inn], [], [], left)[0]:
                raise TimeoutError("chromium did not answer in time")
            part = os.read(self.inn, 1 << 20)
            if not part:
                raise EOFError("chromium ended")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def ask(self, method, **params):
        """Send one command, and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (found := self._message()).get("id") != self.count:
            pass
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found["result"]

    def open(self, page, setting):
        """Load a file at one of SETTINGS."""
        width, height, colours, medium = SETTINGS[setting]
        phone = width < 500
        features = [{"name": "prefers-color-scheme", "value": colours}]
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        self.ask("Emulation.setEmulatedMedia", media=medium, features=features)
        self.ask("Page.navigate", url=Path(page).resolve().as_uri())
        while self.value("document.readyState") != "complete" or self.value("location.protocol") != "file:":
            time.sleep(0.02)

    def value(self, expression):
        """What an expression of JavaScript is on the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def picture(self, *, whole=False):
        """The page as PNG, as far as one sees it or as a whole."""
        return b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])


def colours(png, enough=inf):
    """The different colours of a PNG of eight bits a channel, as a set of bytes; no more once it has enough."""
    at, data, width, channels = 8, b"", 0, 0
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + size]
        if name == b"IHDR":
            width, _, depth, kind = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            channels = {2: 3, 6: 4}[kind]
        data += body if name == b"IDAT" else b""
        at += size + 12
    raw, stride, found = zlib.decompress(data), width * channels, set()
    above = bytearray(stride)
    for start in range(0, len(raw), stride + 1):
        line = _unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), above, channels)
        found |= {bytes(line[i : i + 3]) for i in range(0, stride, channels)}
        if len(found) > enough:
            break
        above = line
    return found


def _unfiltered(kind, line, above, step):
    """One line of a PNG, its filter undone."""
    for i in range(len(line)):
        a = line[i - step] if i >= step else 0
        b, c = above[i], above[i - step] if i >= step else 0
        nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
        line[i] = (line[i] + (0, a, b, (a + b) // 2, nearest)[kind]) & 255
    return line


if __name__ == "__main__":
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with Browser(chromium()) as browser:
        for setting in SETTINGS:
            browser.open(page, setting)
            wide = browser.value("document.documentElement.scrollWidth")
            print(setting, wide, browser.value("document.documentElement.scrollHeight"))
            (folder / f"{page.stem}-{setting}.png").write_bytes(browser.picture(whole=True))
