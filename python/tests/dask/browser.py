"""A headless Chromium that opens a page, waits for a condition in it, and takes a picture."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess

from tornado.websocket import websocket_connect

PATH = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "chrome"])), None)

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1400,900",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
]


class Page:
    def __init__(self, socket):
        self._socket = socket
        self._number = 0

    async def ask(self, method, session=None, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        await self._socket.write_message(json.dumps(message))
        while True:
            text = await self._socket.read_message()
            if text is None:
                raise ConnectionError("the browser hung up")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]

    async def open(self, url):
        target = await self.ask("Target.createTarget", url=url)
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    async def value(self, expression):
        """What an expression in JavaScript is, or None if it fails."""
        answer = await self.ask(
            "Runtime.evaluate", self._session, expression=expression, returnByValue=True
        )
        return None if "exceptionDetails" in answer else answer["result"].get("value")

    async def until(self, expression, timeout=30):
        deadline = asyncio.get_running_loop().time() + timeout
        while not (value := await self.value(expression)):
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"not true in the browser: {expression}")
            await asyncio.sleep(0.1)
        return value

    async def picture(self):
        """A PNG of what the window shows."""
        answer = await self.ask("Page.captureScreenshot", self._session, format="png")
        return base64.b64decode(answer["data"])


@contextlib.asynccontextmanager
async def browsing(url, profile):
    process = await asyncio.create_subprocess_exec(
        PATH, *_FLAGS, f"--user-data-dir={profile}",
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    try:
        while True:
            line = (await process.stderr.readline()).decode()
            if not line:
                raise RuntimeError("the browser did not start")
            if found := re.search(r"listening on (ws://\S+)", line):
                break
        # It goes on complaining of what this machine has not.
        drain = asyncio.ensure_future(process.stderr.read())
        socket = await websocket_connect(found[1], max_message_size=1 << 26)
        page = Page(socket)
        await page.open(url)
        yield page
        await page.ask("Browser.close")
        socket.close()
        await drain
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # `process.kill()` would take its end from asyncio's own watcher.
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()
