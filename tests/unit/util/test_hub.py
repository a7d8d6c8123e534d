"""Hub names: a local directory wins, the cache serves without a network, only data is fetched, and once."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from fuserl_megatron import cli
from fuserl_megatron.config.schema import Config, ModelConfig, ObjectiveConfig
from fuserl_megatron.testing.tiny import save_char_tokenizer, save_tiny_model
from fuserl_megatron.train.preflight import with_local_models
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.hub import local_model

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with the model org/tiny in it, as the client lays it out, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    entry = tmp_path / "cache" / "models--org--tiny"
    snapshot, blobs = entry / "snapshots" / COMMIT, entry / "blobs"
    for directory in (entry / "refs", blobs, snapshot):
        directory.mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMIT)
    save_tiny_model(tmp_path / "made", num_hidden_layers=2)
    save_char_tokenizer(tmp_path / "made")
    for file in (tmp_path / "made").iterdir():
        file.rename(blobs / f"sum-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sum-of-{file.name}")
    return snapshot


def test_a_name_gives_the_snapshot_in_the_cache(cache):
    assert local_model("org/tiny") == str(cache)
    config = with_local_models(
        Config(
            model=ModelConfig(path="org/tiny", tokenizer="org/tiny"), objective=ObjectiveConfig(reference="org/tiny")
        )
    )
    assert {config.model.path, config.model.tokenizer, config.objective.reference} == {str(cache)}


def test_a_local_directory_always_wins(cache, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert local_model("org/tiny") == "org/tiny"
    for path in ("/org/tiny", "./org/tiny", "org", "a/b/c", "???", str(tmp_path)):
        assert local_model(path) == path


def test_without_network_one_line_says_what_to_type(cache, tmp_path):
    with pytest.raises(UserError, match="type `hf download org/other` where there is a network") as caught:
        local_model("org/other")
    assert "\n" not in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


def test_convert_and_build_take_names(cache, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "FUSERL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["convert", "hf-to-megatron", "org/tiny", "m"]) == 0
    assert cli.main(["convert", "megatron-to-hf", "m/iter_0000000", "b", "--hf", "org/tiny"]) == 0
    before, after = (load_file(directory / "model.safetensors") for directory in (cache, tmp_path / "b"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    record = {"prompt": "hi", "source": "a", "response": "yes", "reward": 1.0}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    build = ["build", "inputs=[r.jsonl]", "reward_temperature=1", "output=fused"]
    capsys.readouterr()
    assert cli.main([*build, "tokenizer=org/tiny"]) == 0, capsys.readouterr().err
    assert cli.main([*build, "tokenizer=org/other", "output=more"]) == 2
    assert "hf download org/other" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that fetching a model needs."""

    files: dict[str, bytes]
    fetched: Counter

    def do_GET(self):
        if self.path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        if self.path.startswith(f"/api/models/org/tiny/tree/{COMMIT}"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": f"sum-of-{n}"} for n, c in self.files.items()]
            return self.answer(json.dumps(tree).encode())
        name = self.path.split(f"/org/tiny/resolve/{COMMIT}/")[-1]
        if name not in self.files:
            return self.send_error(404)
        if self.command == "GET":
            self.fetched[name] += 1
        return self.answer(self.files[name], name)

    do_HEAD = do_GET  # noqa: N815 (the server's names)

    def answer(self, content, name=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if name is not None:
            self.send_header("ETag", f'"sum-of-{name}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_fetching_takes_data_only_and_every_file_once_for_all_ranks(tmp_path):
    wanted = {"config.json", "tokenizer.json", "LICENSE", "model.safetensors.index.json"}
    wanted |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    refused = {"modeling_tiny.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"}
    Hub.files = {name: name.encode() * 1000 for name in wanted | refused}
    Hub.fetched = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    code = "from fuserl_megatron.util.hub import local_model; print(local_model('org/tiny'))"
    try:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True, stdout=-1, stderr=-1
            )
            for _ in range(2)
        ]
        answers = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        server.shutdown()
        server.server_close()
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    (directory,) = {Path(out.strip()) for out, _ in answers}
    assert {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()} == wanted
    assert Hub.fetched == dict.fromkeys(wanted, 1)
