"""Pictures of ComfyUI's own interface with our templates, from headless Chromium.

    COMFYUI_DIR=/path/to/ComfyUI python tests/comfyui/browser.py --output docs/images/comfyui.png
    COMFYUI_DIR=/path/to/ComfyUI python tests/comfyui/browser.py --nodes web/docs/images

The first opens a template, runs it and shows the whole graph; the second takes a picture of each node.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from aiohttp import ClientSession
from live_server import REPOSITORY, Server
from PIL import Image

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
]  # fmt: skip


class Page:
    """A page of Chromium behind the DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.calls = socket, 0

    async def call(self, method, **params):
        self.calls += 1
        await self.socket.send_json({"id": self.calls, "method": method, "params": params})
        while True:
            answer = await self.socket.receive_json()
            if answer.get("id") == self.calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    async def evaluate(self, script):
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    async def until(self, script, seconds=120):
        """Wait for a script to give something true."""
        for _ in range(seconds * 2):
            if await self.evaluate(script):
                return
            await asyncio.sleep(0.5)
        raise TimeoutError(f"still false after {seconds} s: {script}")

    async def picture(self, clip=None):
        options = {} if clip is None else {"clip": {**clip, "scale": 1}}
        shot = await self.call("Page.captureScreenshot", format="png", **options)
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


@asynccontextmanager
async def opened(url, width, height):
    """A page of headless Chromium at `url`."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("Chromium is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen([chromium, *flags], stderr=subprocess.DEVNULL)
        try:
            port_file = Path(profile, "DevToolsActivePort")
            while not port_file.exists() or not port_file.read_text().strip():
                await asyncio.sleep(0.1)
            address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}/json"
            async with ClientSession() as session:
                async with session.get(address) as answer:
                    pages = await answer.json()
                target = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(target, max_msg_size=0) as socket:
                    page = Page(socket)
                    await page.call(
                        "Emulation.setDeviceMetricsOverride",
                        width=width,
                        height=height,
                        deviceScaleFactor=1,
                        mobile=False,
                    )
                    await page.call("Page.navigate", url=url)
                    yield page
        finally:
            process.terminate()
            process.wait()


async def load(page, workflow):
    """Load a graph and close what greets new users."""
    await page.until("!!(window.app && window.app.graph && window.app.canvas && window.app.extensionManager)")
    await asyncio.sleep(2)
    await page.evaluate("document.querySelectorAll('.p-dialog-close-button').forEach(button => button.click())")
    await page.evaluate("window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
    await page.evaluate(f"window.app.loadGraphData({json.dumps(workflow)})")
    await page.until(f"window.app.graph._nodes.length === {len(workflow['nodes'])}")
    await asyncio.sleep(1)
    await page.evaluate("document.querySelectorAll('.p-dialog-close-button').forEach(button => button.click())")


FIT = """(box => {
    const canvas = app.canvas, [x, y, w, h] = box;
    const width = canvas.canvas.clientWidth, height = canvas.canvas.clientHeight;
    const scale = Math.min(%s, (width - 2 * %s) / w, (height - 2 * %s) / h);
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = width / 2 / scale - x - w / 2;
    canvas.ds.offset[1] = height / 2 / scale - y - h / 2;
    canvas.setDirty(true, true);
    const origin = canvas.canvas.getBoundingClientRect();
    return {x: origin.x + (x + canvas.ds.offset[0]) * scale, y: origin.y + (y + canvas.ds.offset[1]) * scale,
            width: w * scale, height: h * scale};
})(%s)"""


async def show_graph(server, workflow, output, size):
    """The whole graph after a run, with its pictures."""
    async with opened(server.url, *size) as page:
        await load(page, workflow)
        await page.evaluate("app.queuePrompt(0, 1)")
        await asyncio.sleep(2)
        await page.until(
            "fetch('/queue').then(a => a.json()).then(q => !q.queue_running.length && !q.queue_pending.length)"
        )
        await asyncio.sleep(3)
        box = """(() => {
            const boxes = app.graph._groups.map(g => g._bounding).concat(app.graph._nodes.map(n => [n.pos[0], n.pos[1], ...n.size]));
            const x = Math.min(...boxes.map(b => b[0])), y = Math.min(...boxes.map(b => b[1]));
            return [x, y, Math.max(...boxes.map(b => b[0] + b[2])) - x, Math.max(...boxes.map(b => b[1] + b[3])) - y];
        })()"""
        await page.evaluate(FIT % (1, 60, 60, box))
        await asyncio.sleep(2)
        save(await page.picture(), output)


async def show_nodes(server, folder, kinds):
    """Each node as it stands in the interface."""
    async with opened(server.url, 1400, 1300) as page:
        await load(
            page, {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "version": 0.4}
        )
        for kind in kinds:
            await page.evaluate(
                f"(() => {{app.graph.clear(); const n = LiteGraph.createNode('{kind}'); app.graph.add(n); n.pos = [0, 0];"
                " n.size = [Math.max(n.size[0], 400), n.computeSize()[1]];})()"
            )
            box = "[-10, -40, app.graph._nodes[0].size[0] + 20, app.graph._nodes[0].size[1] + 50]"
            clip = await page.evaluate(FIT % (1.4, 20, 20, box))
            await asyncio.sleep(1)
            save(await page.picture(clip), folder / f"{kind}.png")


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256).save(path, optimize=True)
    print(f"wrote {path}, {picture.width} x {picture.height}, {path.stat().st_size / 1024:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="fit-and-compare")
    parser.add_argument("--output", type=Path, help="picture of the graph after a run")
    parser.add_argument("--nodes", type=Path, help="folder for a picture of each node")
    parser.add_argument("--size", default="2400x1250", help="of the window")
    options = parser.parse_args()
    workflow = json.loads((REPOSITORY / "workflows" / f"{options.template}.json").read_text())
    with tempfile.TemporaryDirectory() as base:
        server = Server(Path(base), os.environ["COMFYUI_DIR"])
        try:
            server.wait()
            if options.output:
                width, height = map(int, options.size.split("x"))
                asyncio.run(show_graph(server, workflow, options.output, (width, height)))
            if options.nodes:
                kinds = sorted(
                    kind for kind, info in server.get("/object_info").items() if info["category"] == "AcT Maps"
                )
                asyncio.run(show_nodes(server, options.nodes, kinds))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
