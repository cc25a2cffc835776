"""Hub ids, against a hub on this machine that answers as the real one does, or not at all."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from tests.models.folders import folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: dict[str, dict[str, bytes] | str], silent: Event | None = None) -> Iterator[str]:
    """Serve repositories: their files, or the code of the error with which the hub refuses them."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            if silent is not None:
                silent.wait(60)
                return
            path = self.path.partition("?")[0]
            name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
            files = repositories.get(name, "RepoNotFound")
            if isinstance(files, str):
                self.answer({"RepoNotFound": 404, "GatedRepo": 403}[files], X_Error_Code=files)
            elif path.startswith("/api/models"):
                siblings = [{"rfilename": file} for file in files]
                tree = [{"type": "file", "path": k, "size": len(v), "oid": _etag(v)} for k, v in files.items()]
                info = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings}
                self.answer(200, json.dumps(tree if "/tree/" in path else info).encode())
            else:
                found = files.get(path.partition("/resolve/")[2].partition("/")[2])
                if found is None:
                    self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                else:
                    self.answer(200, found, ETag=f'"{_etag(found)}"', X_Repo_Commit=COMMIT)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def loaded(names: list[str], endpoint: str, home: Path) -> list[str]:
    """Load models in a fresh Python; return the class of the pipeline, or the error, of each."""
    code = (
        "import sys\n"
        "from dicache.models.loading import load\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(type(load(name)).__name__)\n"
        "    except Exception as error: print(type(error).__name__ + ': ' + str(error))\n"
    )
    # The hub's client reads all of these where it is imported.
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    out = subprocess.run([sys.executable, "-c", code, *names], env=env, capture_output=True, text=True, check=True)
    return out.stdout.splitlines()


def files_of(kind: str) -> dict[str, bytes]:
    where = folder(kind)
    return {str(file.relative_to(where)): file.read_bytes() for file in where.rglob("*") if file.is_file()}


def test_a_hub_id_is_fetched_once_and_what_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    pickled = {re.sub(r"\.safetensors$", ".bin", file): content for file, content in files_of("dit").items()}
    repositories: dict[str, dict[str, bytes] | str] = {
        "tiny/dit": {**files_of("dit"), "transformer/diffusion_pytorch_model.bin": b"never fetched"},
        "tiny/pickled": pickled,
        "tiny/other": {"README.md": b"no pipeline"},
        "stabilityai/stable-diffusion-3-medium-diffusers": "GatedRepo",
        "tiny/code": {
            **files_of("dit"),
            "model_index.json": json.dumps({"_class_name": ["pipeline", "Mine"], "vae": ["mine", "Mine"]}).encode(),
            "pipeline.py": b"raise SystemExit('this was run')",
            "vae/mine.py": b"raise SystemExit('this was run')",
        },
    }
    with hub(repositories) as endpoint:
        names = ["tiny/dit", "tiny/pickled", "tiny/other", "tiny/nothing", "sd3", "tiny/code"]
        fetched, unsafe, other, missing, gated, code = loaded(names, endpoint, tmp_path)
    assert fetched == "DiTPipeline"
    assert not list(tmp_path.rglob("*.bin"))
    assert unsafe.startswith("ModelError: tiny/pickled: tiny/pickled has no safetensors weights")
    assert "P.from_pretrained('tiny/pickled').save_pretrained('pickled-safetensors')" in unsafe
    assert other.startswith("ModelError: tiny/other: tiny/other has no model_index.json")
    assert missing.startswith(
        "ModelError: tiny/nothing: there is no repository tiny/nothing on the hub nor a folder tiny/nothing here"
    )
    assert gated.startswith(
        "ModelError: sd3: stabilityai/stable-diffusion-3-medium-diffusers is gated; accept its licence at https://"
    )
    assert "`hf auth login`" in gated
    assert code.startswith("ModelError: tiny/code: ")
    assert "this was run" not in code

    cached, absent = loaded(["tiny/dit", "pixart"], endpoint, tmp_path)  # from a hub that is no longer there
    assert cached == "DiTPipeline"
    assert absent.startswith("ModelError: pixart: cannot get PixArt-alpha/PixArt-XL-2-1024-MS from the hub (")
    assert "`hf download PixArt-alpha/PixArt-XL-2-1024-MS`" in absent
    assert "pass that folder as --model" in absent


def test_a_hub_that_never_answers_is_not_waited_for_long(tmp_path: Path) -> None:
    over = Event()
    with hub({}, silent=over) as endpoint:
        before = monotonic()
        [message] = loaded(["tiny/dit"], endpoint, tmp_path)
        over.set()
    assert message.startswith("ModelError: tiny/dit: cannot get tiny/dit from the hub (")
    assert monotonic() - before < 60
