"""A live, headless ComfyUI with our pack in its custom_nodes, driven over HTTP and the websocket as the browser does."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import ClientSession, WSMsgType
from PIL import Image

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PACK = "AcT-Maps"  # a clone may have any folder name


@dataclass
class Result:
    """What came of one prompt."""

    prompt_id: str
    outputs: dict = field(default_factory=dict)
    executed: list = field(default_factory=list)
    cached: list = field(default_factory=list)
    progress: list = field(default_factory=list)
    error: dict | None = None
    interrupted: bool = False


class Server:
    """ComfyUI with a base directory of its own. Files of the pack are those that git tracks or would track."""

    def __init__(self, base: Path, comfyui: str):
        self.base, self.log = base, base / "server.log"
        pack = base / "custom_nodes" / PACK
        for folder in ("models/checkpoints", "models/act_maps", "input", "output", "temp", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=REPOSITORY, text=True).splitlines():
            if (REPOSITORY / name).is_file():
                (pack / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, pack / name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable, str(HERE / "launch.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(base), "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK,
            "--disable-api-nodes", "--database-url", f"sqlite:///{base}/comfyui.db",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACTMAPS_PRESETS": str(base / "presets")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def wait(self, seconds: float = 180) -> None:
        """Until the server answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
            else:
                return
        raise RuntimeError(f"ComfyUI did not start:\n{self.tail()}")

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text()[-characters:]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def raw(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict | list:
        return json.loads(self.raw(path))

    def validate(self, prompt: dict) -> dict:
        """What the server says of a prompt that it refuses, without running it."""
        try:
            self.raw("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as refused:
            return json.loads(refused.read())
        raise AssertionError("the server took the prompt")

    def interrupt(self) -> None:
        self.raw("/interrupt", {})

    def run(self, prompt: dict, timeout: float = 240, on_progress=None) -> Result:
        """Queue a prompt and follow it to its end. `on_progress(result)` is called with every progress message."""
        import asyncio

        outcome: list = []

        def follow() -> None:
            try:
                outcome.append(asyncio.run(asyncio.wait_for(self._follow(prompt, on_progress), timeout)))
            except BaseException as error:
                outcome.append(error)

        # A loop of its own in a thread of its own, whatever loop the test runs in.
        thread = threading.Thread(target=follow)
        thread.start()
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise RuntimeError(f"{outcome[0]!r}; the server's log ends:\n{self.tail()}") from outcome[0]
        return outcome[0]

    async def _follow(self, prompt: dict, on_progress) -> Result:
        client = uuid.uuid4().hex
        async with ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId={client}") as socket_:
            body = {"prompt": prompt, "client_id": client}
            async with session.post(f"{self.url}/prompt", json=body) as answer:
                queued = await answer.json()
                if answer.status != 200:
                    raise AssertionError(f"refused: {json.dumps(queued)[:3000]}")
            result = Result(queued["prompt_id"])
            async for message in socket_:
                if message.type != WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id", result.prompt_id) != result.prompt_id:
                    continue
                if kind == "executing" and data["node"] is not None:
                    result.executed.append(data["node"])
                elif kind == "execution_cached":
                    result.cached += data["nodes"]
                elif kind == "progress":
                    result.progress.append((data["node"], data["value"], data["max"]))
                    if on_progress is not None:
                        on_progress(result)
                elif kind == "executed":
                    result.outputs[data["node"]] = data["output"]
                elif kind == "execution_error":
                    result.error = data
                    return result
                elif kind == "execution_interrupted":
                    result.interrupted = True
                    return result
                elif kind == "execution_success":
                    return result
        raise AssertionError("the connection was closed")

    def images(self, result: Result, node: str) -> list[Image.Image]:
        """The pictures that a node showed or saved."""
        pictures = []
        for found in result.outputs[node]["images"]:
            query = f"filename={found['filename']}&subfolder={found['subfolder']}&type={found['type']}"
            pictures.append(Image.open(io.BytesIO(self.raw(f"/view?{query}"))).convert("RGB"))
        return pictures
