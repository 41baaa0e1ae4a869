#!/usr/bin/env python3
"""Looks at pages of `longspan bench` in headless Chromium, as ci/page.sh does.

    page.py FOLDER NAME...      FOLDER/NAME.html against FOLDER/NAME.json; screenshots go to FOLDER

Checks, at 360 and at 1280 CSS pixels, light and dark: nothing on the console, no request but for the page itself, no
horizontal overflow, as many rows in the table as in the JSON, every picture has a size, and text can be told from what is
behind it. Needs chromium and chromedriver; nothing of Python's but its own library.
"""

import base64
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

SIZES = {"phone": (360, 780, True), "desktop": (1280, 900, False)}
SCHEMES = ["light", "dark"]

LOOK = """
const box = document.documentElement;
const channel = x => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; };
const rgb = text => text.match(/[0-9.]+/g).map(Number);
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const behind = e => {
    for (; e; e = e.parentElement) {
        const c = rgb(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
};
const contrast = e => {
    const style = getComputedStyle(e);
    const ink = rgb(e.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
};
const texts = [...document.querySelectorAll('h1,h2,p,dt,dd,td,th,li,figcaption,svg text,small')];
const faint = texts.filter(e => contrast(e) < 4.5).map(e => e.textContent.slice(0, 40));
const wide = [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > box.clientWidth + 0.5
    && getComputedStyle(e).position !== 'absolute' && !e.closest('thead'));
return {
    width: box.clientWidth,
    scroll: Math.max(box.scrollWidth, document.body.scrollWidth),
    wide: wide.map(e => e.tagName + ' ' + e.textContent.slice(0, 30)),
    rows: document.querySelectorAll('#rows tbody tr').length,
    pictures: [...document.querySelectorAll('figure > svg')].map(e => [e.clientWidth, e.clientHeight]),
    faint: faint,
    paper: getComputedStyle(document.body).backgroundColor,
};
"""


def call(port, method, path, body=None):
    """One command of the WebDriver protocol."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["value"]


def driver(log):
    """Starts chromedriver; its process and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], stdout=log, stderr=log)
    for _ in range(100):
        try:
            call(port, "GET", "/status")
            return process, port
        except OSError:
            time.sleep(0.1)
    process.kill()
    sys.exit("chromedriver does not answer")


def browser(port, profile, size):
    """A session of headless Chromium with a screen of this size."""
    width, height, mobile = size
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
                 f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    options = {"binary": shutil.which("chromium"), "args": arguments}
    if mobile:
        options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0, "mobile": True}}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options,
              "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
    return "/session/" + call(port, "POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]


def devtools(port, session, command, **parameters):
    return call(port, "POST", f"{session}/goog/cdp/execute", {"cmd": command, "params": parameters})


def requests(port, session, page):
    """Addresses that the page asked for, beside itself. What the browser's own first tab asks for is not counted."""
    entries = call(port, "POST", f"{session}/se/log", {"type": "performance"})
    events = [json.loads(entry["message"])["message"] for entry in entries]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [s["request"]["url"] for s in sent if s["documentURL"] == page]
    return [url for url in asked if url != page and not url.startswith("data:")]


def look(port, session, page, name):
    """Faults of the page on this screen, in both schemes."""
    rows = len(json.loads(page.with_suffix(".json").read_text())["rows"])
    faults, papers = [], set()
    for scheme in SCHEMES:
        devtools(port, session, "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        call(port, "POST", f"{session}/url", {"url": page.as_uri()})
        seen = call(port, "POST", f"{session}/execute/sync", {"script": LOOK, "args": []})
        papers.add(seen["paper"])
        console = [entry["message"] for entry in call(port, "POST", f"{session}/se/log", {"type": "browser"})]
        asked = requests(port, session, page.as_uri())
        where = f"{page.name}, {name}, {scheme}"
        for wrong, what in [
            (seen["width"] != SIZES[name][0], f"the screen is {seen['width']} wide"),
            (seen["scroll"] > seen["width"], f"{seen['scroll']} pixels on a screen of {seen['width']}: {seen['wide'][:5]}"),
            (seen["wide"], f"reach beyond the screen: {seen['wide'][:5]}"),
            (seen["rows"] != rows, f"{seen['rows']} rows in the table, {rows} in the JSON"),
            (not seen["pictures"], "there is no picture"),
            (any(min(size) < 60 for size in seen["pictures"]), f"pictures are small: {seen['pictures']}"),
            (seen["faint"], f"text is faint: {seen['faint'][:5]}"),
            (console, f"the console says {console}"),
            (asked, f"the page asked for {asked}"),
        ]:
            if wrong:
                faults.append(f"{where}: {what}")
        shot = devtools(port, session, "Page.captureScreenshot", captureBeyondViewport=True)
        page.with_name(f"{page.stem}-{name}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    if len(papers) != len(SCHEMES):
        faults.append(f"{page.name}, {name}: light and dark look the same")
    return faults


def main():
    folder = pathlib.Path(sys.argv[1]).resolve()
    pages = [folder / f"{name}.html" for name in sys.argv[2:]]
    faults = []
    with tempfile.TemporaryDirectory() as work, open(pathlib.Path(work) / "log", "w") as log:
        process, port = driver(log)
        try:
            for name, size in SIZES.items():
                session = browser(port, f"{work}/{name}", size)
                try:
                    for page in pages:
                        faults += look(port, session, page, name)
                finally:
                    call(port, "DELETE", session)
        finally:
            process.terminate()
            process.wait(10)
    for fault in faults:
        print(fault)
    print(f"{len(pages) * len(SIZES) * len(SCHEMES)} looks at {len(pages)} pages, {len(faults)} faults")
    sys.exit(1 if faults or not pages else 0)


if __name__ == "__main__":
    main()
