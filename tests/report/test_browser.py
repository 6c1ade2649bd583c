"""The page in a real browser: it draws, it logs nothing, it asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fewbits.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
# a browser speaks to its maker on its own account, whatever page it shows
OWN_HOSTS = ("google.com", "googleapis.com", "gstatic.com")


@dataclass
class Seen:
    """What the browser made of a page: the document after its script ran, console lines, hosts it asked for."""

    dom: str
    console: list[str]
    hosts: set[str]


def browse(page: Path, folder: Path) -> Seen:
    net_log = folder / "net.json"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", f"--log-net-log={net_log}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(net_log.read_text())["events"]
    urls = [event.get("params", {}).get("url", "") for event in events]
    hosts = {urlsplit(url).hostname or "" for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))}
    return Seen(done.stdout, console, {host for host in hosts if not host.endswith(OWN_HOSTS)})


def test_the_report_draws_everything_and_asks_for_nothing(run_folder: Path, tmp_path: Path) -> None:
    seen = browse(write_report(run_folder), tmp_path)
    assert seen.console == []
    assert seen.hosts == set()
    # the script ran: of twenty histograms it hid all but the one chosen
    assert len(re.findall(r'<figure class="histogram"', seen.dom)) == 20
    assert len(re.findall(r'<figure class="histogram" hidden', seen.dom)) == 19
    assert len(re.findall(r'class="column"', seen.dom)) == 80
    assert len(re.findall(r'class="plot curve"', seen.dom)) == 3
    assert seen.dom.count("<svg") == 20 + 3 + 2


def test_pointing_choosing_and_sorting(run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder)
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    act = """<script>
      document.getElementById("histogram-layer").selectedIndex = 3;
      document.getElementById("histogram-layer").dispatchEvent(new Event("change"));
      document.querySelectorAll(".sortable th button")[9].click();
      const plot = document.querySelectorAll(".plot.curve")[2], box = plot.getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 1, clientY: box.top + 1 }));
    </script></body>"""
    page.write_text(html.replace("</body>", act))
    seen = browse(page, tmp_path)
    assert seen.console == []
    shown = re.findall(r'<figure class="histogram"( hidden="")?', seen.dom)
    assert [i for i, hidden in enumerate(shown) if not hidden] == [3]
    table = seen.dom.split('class="figures sortable"')[1]
    assert re.findall(r'<th scope="row">(.*?)</th>', table)[0] == "layer3.2.conv2"  # the lowest SQNR is that of 1 bit
    tip = seen.dom.split('<div id="tip"')[1]
    assert re.findall(r"<div>(.*?)</div>", tip)[:2] == ["step 0", "train: 0.01"]


def test_a_hostile_name_runs_nothing(run_folder: Path, tmp_path: Path) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    result["recipe"] = "</title></script><script>console.error('ran')</script><img src=http://outside.test/x>"
    result["plan"]["layers"][0]["name"] = '"><svg onload="console.error(1)"></svg>'
    (run_folder / "result.json").write_text(json.dumps(result))
    seen = browse(write_report(run_folder), tmp_path)
    assert seen.console == []
    assert seen.hosts == set()


def test_the_policy_stops_what_escaping_would_miss(run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder)
    html = page.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>")
    page.write_text(html)
    seen = browse(page, tmp_path)
    assert "<title>ran</title>" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def test_the_probe_sees_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://outside.test/x.png'><script>console.error('seen')</script>")
    seen = browse(page, tmp_path)
    assert any("seen" in line for line in seen.console)
    assert seen.hosts == {"outside.test"}
