"""The data card: what is saved loads back, what the card says is counted, and a push reaches a hub over HTTP."""

import base64
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
import yaml

from s1book.card import (
    CARD_FILE, COLUMN_NOTES, DATA_FILE, LICENCES, S1K_SCHEMA, CardFacts, card_metadata, licence_of, push_dataset,
    dataset_card, save_dataset, source_table,
)
from s1book.config import S1Error, load_preset
from s1book.pool import COLUMNS, Source, collect, write_account
from s1book.select import BY_BENCHMARK, DRAWN, PICK, WHOLE_POOL, Step

# What the hub accepts, from its documentation (dataset cards; licences; task names).
HUB = {"license": {"apache-2.0", "mit", "cc-by-4.0", "other"}, "task_categories": {"text-generation", "question-answering"},
       "size_categories": {"n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M"}, "language": {"en"}}


def rows(n=40, seed=0, **fields):
    rng = random.Random(seed)
    plain = {"question": "Is\n\n2 | 3 < \"5\"? ü \x07", "solution": None, "answer": "yes", "source_type": "tiny/sum",
             "cot_type": "open", "metadata": "{}", "trace": "think\n", "attempt": "5", "small_correct": False,
             "base_correct": False, "error": None, "teacher_correct": True, "how": DRAWN}
    return [plain | {"question_hash": f"{i:016x}", "domain": rng.choice(["sum", "nim"]),
                     "trace_tokens": rng.randrange(9, 99)} | fields for i in range(n)]


def facts(tmp_path, *overrides):
    file = tmp_path / "features.parquet"
    file.write_bytes(b"abc")
    steps = [Step("quality", "no ![Image]", 90, 70, ("aa", "bb")), Step("diversity", "drawn", 70, 40)]
    return CardFacts.of("tiny", load_preset("tiny", list(overrides)), steps, [file])


def saved(tmp_path, members=None, *overrides):
    folder = save_dataset(members or rows(), tmp_path / "s1k", facts(tmp_path, *overrides))
    head, body = (folder / CARD_FILE).read_text(encoding="utf-8").split("\n---\n", 1)
    return folder, yaml.safe_load(head.removeprefix("---\n")), body


def table(body, title):
    """The cells of the first table below a heading, without its head."""
    lines = body.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return cells[2:]


def test_the_library_loads_what_was_saved(tmp_path):
    from datasets import Features, load_dataset
    members = rows(teacher_correct=None)
    folder, *_ = saved(tmp_path, members)
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"] and loaded["train"].features == Features.from_arrow_schema(S1K_SCHEMA)
    wanted = [{name: row[name] for name in S1K_SCHEMA.names} for row in members]
    assert loaded["train"].to_list() == wanted == list(load_dataset(str(folder), split="train", streaming=True))
    assert sorted(file.name for file in folder.iterdir()) == [CARD_FILE, DATA_FILE]


def test_the_same_set_gives_the_same_bytes_and_replaces_the_old(tmp_path):
    first = {f.name: f.read_bytes() for f in saved(tmp_path)[0].iterdir()}
    assert first == {f.name: f.read_bytes() for f in saved(tmp_path)[0].iterdir()}
    (tmp_path / "s1k" / "left_over").touch()
    other = {f.name: f.read_bytes() for f in saved(tmp_path, rows(7))[0].iterdir()}
    assert other.keys() == first.keys() and other != first


def test_a_save_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    folder, *_ = saved(tmp_path)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    monkeypatch.setattr("s1book.card.dataset_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved(tmp_path, rows(7))
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", [[], [{"domain": None}], [{"trace_tokens": None}], [{"how": None}]])
def test_rows_that_were_not_selected_are_refused(tmp_path, broken):
    members = [rows(1)[0] | change for change in broken]
    with pytest.raises(S1Error, match=f"s1k: found {len(broken)} rows"):
        save_dataset(members, tmp_path / "s1k", facts(tmp_path))
    assert not (tmp_path / "s1k").exists()


def test_the_head_is_what_the_library_and_the_hub_read(tmp_path):
    from huggingface_hub import DatasetCard
    folder, head, _ = saved(tmp_path)
    assert DatasetCard.load(folder / CARD_FILE).data.to_dict() == head
    assert not hub_errors((folder / CARD_FILE).read_text())
    assert head["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILE}]}]


@pytest.mark.parametrize("n, category", [
    (1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (10_000, "10K<n<100K"), (59_029, "10K<n<100K")])
def test_size_categories(n, category):
    assert card_metadata([{"source_type": "tiny/sum"}] * n, "t")["size_categories"] == [category]


def test_licences_are_known_or_said_to_be_unknown():
    assert card_metadata([{"source_type": "tiny/sum"}], "t")["license"] == "apache-2.0"
    assert card_metadata([{"source_type": "a/b"}], "t")["license"] == "other"
    assert card_metadata([{"source_type": "tiny/sum"}, {"source_type": "TIGER-Lab/TheoremQA/float"}], "t")["license"] == "other"
    assert {licence for licence, _ in LICENCES.values()} <= HUB["license"]
    assert "not checked" in licence_of("qq8933/AIME_1983_2024")[1] and "not to show" in licence_of("Idavidrein/gpqa")[1]
    assert source_table([{"source_type": f"KbsdJames/Omni-MATH/{i}"} for i in range(3)]) == {"KbsdJames/Omni-MATH": (3, "Apache-2.0")}


def test_the_card_counts_how_each_row_got_in(tmp_path):
    members = rows(9, how=PICK) + rows(31)[9:] + rows(40, how=BY_BENCHMARK)[31:]
    _, _, body = saved(tmp_path, members, "seed=4", "select.algorithm=code")
    lines = {line[0]: list(map(int, line[1:])) for line in table(body, "How each row got in")}
    assert lines.pop("**all**") == [9, 9, 22, 40]
    for domain, counts in lines.items():
        inside = [row["how"] for row in members if row["domain"] == domain]
        assert counts == [inside.count(PICK), inside.count(BY_BENCHMARK), inside.count(DRAWN), len(inside)]
    assert "Algorithm `code`, seed 4." in body and "leans towards the tests" in body
    assert "Nothing was drawn" in saved(tmp_path, rows(how=WHOLE_POOL))[2]


def test_the_card_holds_the_run(tmp_path):
    _, _, body = saved(tmp_path, rows(teacher_correct=False), "select.quality=clean", "seed=4")
    assert table(body, "The funnel") == [["quality", "no ![Image]", "90", "70", "`aa` `bb`"],
                                         ["diversity", "drawn", "70", "40", ""]]
    assert [line[0].strip("`") for line in table(body, "Columns")] == S1K_SCHEMA.names == list(COLUMN_NOTES)
    assert table(body, "Made from") == [["`features.parquet`", f"`{hashlib.sha256(b'abc').hexdigest()}`"]]
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.S).group(1))
    assert shown["seed"] == 4 and shown["select"] == load_preset("tiny", ["select.quality=clean"]).select.model_dump()
    assert table(body, "Sources and licences") == [["tiny/sum", "40", LICENCES["tiny/"][1]]]
    assert "40 of 40 graded attempts are wrong" in body and "procedural" in body and "by benchmark weight" not in body


def test_no_path_of_the_machine_is_on_the_card(tmp_path):
    _, _, body = saved(tmp_path, rows(), f"pool.source={tmp_path}/mine", f"pool.folder={tmp_path}/copies", "pool.size=2000")
    assert str(tmp_path) not in body and "source: mine" in body and "folder: copies" in body


def hub_errors(readme):
    """What the hub would say of a card's head."""
    head = yaml.safe_load(readme.split("---\n")[1])
    return [{"message": f'"{name}" must be one of {sorted(allowed)}'} for name, allowed in HUB.items()
            if not set([head[name]] if isinstance(head[name], str) else head[name]) <= allowed]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that an upload uses, with files kept in memory."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(path)
        if self.headers.get("Authorization") != "Bearer secret-token" or hub.refuses in path:
            return self.answer({"error": "no"}, 403)
        if path == "/api/validate-yaml":
            errors = hub_errors(json.loads(body)["content"])
            return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path == "/api/repos/create":
            new = json.loads(body)
            name = f"{new['organization']}/{new['name']}"
            known = name in hub.repos
            private = new.get("private", new.get("visibility") == "private")  # releases of the client differ
            hub.repos.setdefault(name, {"private": private, "type": new["type"], "files": {}, "commits": []})
            return self.answer({"url": f"{hub.url}/datasets/{name}"}, 409 if known else 200)
        if "/preupload/" in path:
            modes = [{"path": f["path"], "uploadMode": hub.mode if f["path"].endswith(".parquet") else "regular",
                      "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}} for o in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(hub.repos["/".join(path.split("/")[3:5])], body)
        return self.answer({"error": f"unknown {path}"}, 404)

    def commit(self, repo, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.blobs[value["oid"]]
        self.answer({"commitUrl": f"{self.server.url}/datasets/owner/name/commit/1", "commitOid": "1", "success": True})

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.blobs, server.asked, server.mode, server.refuses = {}, {}, [], "regular", "-never-"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(folder, home, url, options="", token="secret-token", **extra):
    """The one call in a fresh Python, since the library reads the address of the hub when it is imported."""
    code = ("import sys; from s1book.card import push_dataset; from s1book.config import S1Error\n"
            f"try: print(push_dataset(sys.argv[1], 'owner/name'{options}))\n"
            "except S1Error as error: sys.exit(str(error))")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), **({"HF_TOKEN": token} if token else {}), **extra}
    return subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("mode, extra", [("regular", {}), ("lfs", {"HF_HUB_DISABLE_XET": "1"})])
def test_one_call_brings_rows_and_card_to_the_hub(tmp_path, hub, mode, extra):
    folder, *_ = saved(tmp_path)
    (folder / "notes.txt").write_text("mine")
    hub.mode = mode
    done = push(folder, tmp_path, hub.url, **extra)
    assert done.returncode == 0 and done.stdout.strip() == f"{hub.url}/datasets/owner/name/commit/1", done.stderr
    repo = hub.repos["owner/name"]
    assert repo["files"] == {name: (folder / name).read_bytes() for name in (CARD_FILE, DATA_FILE)}
    assert repo["private"] is True and repo["type"] == "dataset" and repo["commits"] == ["s1k: rows and card"]
    assert "/api/validate-yaml" in hub.asked and bool(hub.blobs) == (mode == "lfs")
    again = push(folder, tmp_path, hub.url, ", private=False", **extra)  # an existing repository stays as it is
    assert again.returncode == 0 and repo["private"] is True and len(repo["commits"]) == 2


def test_public_only_when_asked(tmp_path, hub):
    assert push(saved(tmp_path)[0], tmp_path, hub.url, ", private=False").returncode == 0
    assert hub.repos["owner/name"]["private"] is False


@pytest.mark.parametrize("refuses", ["/repos/create", "/validate-yaml", "/commit/"])
def test_a_refusal_of_the_hub_is_one_sentence_without_the_token(tmp_path, hub, refuses):
    folder, *_ = saved(tmp_path)
    hub.refuses = refuses
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    done = push(folder, tmp_path, hub.url)
    assert done.returncode == 1 and "owner/name: the hub did not take s1k" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "secret-token" not in done.stderr
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    done = push(saved(tmp_path)[0], tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1 and "did not take s1k (ConnectError" in done.stderr, done.stderr


def test_without_a_token_nothing_is_sent(tmp_path, hub):
    done = push(saved(tmp_path)[0], tmp_path, hub.url, token=None)
    assert done.returncode == 1 and "found no token" in done.stderr and "HF_TOKEN" in done.stderr
    done = push(saved(tmp_path)[0], tmp_path, hub.url, ", token=False")
    assert "found no token" in done.stderr and hub.asked == []


@pytest.mark.parametrize("lost", [CARD_FILE, DATA_FILE])
def test_a_folder_that_lacks_a_part_is_not_pushed(tmp_path, lost):
    folder, *_ = saved(tmp_path)
    (folder / lost).unlink()
    with pytest.raises(S1Error, match=f"s1k: found no {lost}"):
        push_dataset(folder, "owner/name", token="x")


def test_the_recorded_set_is_such_a_folder():
    from s1book.config import project_root
    folder = project_root() / "data" / "reference" / "s1k"
    recorded = pq.read_table(folder / DATA_FILE)
    assert recorded.schema.equals(S1K_SCHEMA) and recorded.num_rows == 1000
    assert not hub_errors((folder / CARD_FILE).read_text(encoding="utf-8"))


def test_the_card_names_the_sources_that_the_pool_goes_without(tmp_path):
    """A pool collected with pool.missing: skip announces it: a cheaper path is never silent."""
    raws = [{"q": "one"}]
    mapper = lambda raw: {name: None for name in COLUMNS} | {"question": raw["q"]}
    there = Source("there", lambda: raws, ("q",), mapper)
    found = collect([there, Source("changed", lambda: raws, ("question",), mapper)], missing="skip")
    write_account(found, ledger := tmp_path / "pool_ledger.csv", tmp_path / "pairs.csv")
    for path, lacks in ((ledger, True), (None, False)):
        facts = CardFacts.of("tiny", load_preset("tiny"), [], [], path)
        card = dataset_card(rows(), facts)
        assert ("The pool goes without a source: source changed: column question is missing." in card) == lacks
