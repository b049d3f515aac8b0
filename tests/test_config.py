"""Presets are refused by one sentence; files survive kills; seeds do not depend on order."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from s1book.config import (
    MissingArtefact, PresetError, Run, RunFolder, S1Error, append_jsonl, atomic, item_seed, load_preset,
    parameters, preset_names, project_root, read_jsonl, show_path,
)
from s1book.cost import train_seconds
from s1book.preflight import check_weights, doctor, estimates

SIXTEEN = ["pool.source=s1-sources", "teacher.kind=openai", "features.domain=llm"]   # what they need


def refusal(*changes, name="tiny"):
    """The sentence with which a preset is refused."""
    with pytest.raises(PresetError) as error:
        load_preset(name, list(changes))
    text = str(error.value)
    assert "\n" not in text and "found" in text and "wanted" in text
    return text


def test_every_number_of_the_paper_is_in_the_h100_preset():
    p = load_preset("h100")
    sft, budget = p.sft, p.budget
    assert p.model.base == "Qwen/Qwen2.5-32B-Instruct" and p.pool.source == "simplescaling/s1K-1.1"
    assert (sft.learning_rate, sft.betas, sft.weight_decay) == (1e-5, (0.9, 0.95), 1e-4)
    assert (sft.epochs, sft.batch_size, p.steps, sft.warmup) == (5, 16, 315, 0.05)
    assert (sft.schedule, sft.bf16, sft.max_length, sft.sharding) == ("cosine", True, 20000, "fsdp")
    assert budget.maxima == (500, 1000, 2000, 4000, 8000, 16000) and budget.waits == (0, 1, 2, 4, 6)
    assert (p.engine.dtype, p.engine.tensor_parallel) == ("float32", 8)
    assert p.launch.devices == 16


def test_both_presets_train_the_papers_315_steps():
    assert preset_names() == ["h100", "tiny"]
    assert {load_preset(name).steps for name in preset_names()} == {315}


@pytest.mark.parametrize("change, words", [
    ("sft.learning_rat=1", "did you mean sft.learning_rate?"),
    ("lerning_rate=1", "did you mean sft.learning_rate?"),
    ("seed=1.5", "found 1.5, wanted a valid integer"),
    ("seed=true", "found true"),
    ("seed=-1", "greater than or equal to 0"),
    ("seed=", "found null"),
    ("seed.deep=1", "unknown key"),
    ("sft=3", "a section with keys"),
    ("sft.learning_rate=fast", 'found "fast"'),
    ("sft.learning_rate=.nan", "sft.learning_rate"),
    ("sft.batch_size=12", "a multiple of micro_batch_size x devices = 16"),
    ("sft.bf16=true", "false on device cpu"),
    ("select.size=24001", "at most pool.size = 24000"),
    ("pool.source=nowhere", 'pool.source: found "nowhere", wanted tiny, s1-sources, owner/name'),
    ("pool.source=s1-sources", 'teacher.kind: found "tiny", wanted openai'),
    ("pool.only=[MATH]", "wanted nothing unless pool.source is s1-sources"),
    ("pool.near=0.3", "pool.near: found 0.3, wanted 0, or from 0.6 to 1"),
    ("pool.near=1.5", "less than or equal to 1"),
    ("pool.missing=ignore", "'refuse' or 'skip'"),
    ("select.uniform_until=1001", "at most select.size = 1000"),
    ("budget.maxima=[-1, 8]", "none below 0"),
    ("budget.maxima=[8, 8]", "rising"),
    ("budget.maxima=[9999]", "at most budget.max_thinking_tokens"),
    ("budget.waits=[]", "at least 1 item"),
    ("engine.kind=vlm", "'transformers', 'vllm' or 'server'"),
    ("engine.context=100", "more than max_thinking_tokens"),
    ("evaluate.benchmarks=[a, a]", "each benchmark once"),
    ("sft.betas=[0.9, 1.0]", "not including, 1"),
    ("launch.gpus_per_node=2", "launch.gpus_per_node: found 2, wanted 0 on device cpu"),
    ("device=cuda", "at least 1 on device cuda"),
    ("seed", "no key=value pair"),
    ("evaluate.benchmarks=[a", "broken YAML"),
])
def test_a_bad_override_is_refused(change, words):
    assert words in refusal(change)


def test_an_unknown_source_is_refused_with_the_names_that_exist():
    assert 'pool.only: found "MAHT", wanted names out of MATH, OlympicArena' in refusal(
        "pool.source=s1-sources", "pool.only=[AIME, MAHT]")
    assert load_preset("tiny", [*SIXTEEN, "pool.only=[AIME, MATH]"]).pool.only == ("AIME", "MATH")


def test_the_sentence_names_the_override_or_the_file(tmp_path):
    assert refusal("seed=1.5").startswith("Override 'seed=1.5': seed:")
    text = Path("s1book/presets/tiny.yaml").read_text().replace("epochs: 5", "epochs: five")
    (tmp_path / "mine.yaml").write_text(text)
    assert refusal(name=str(tmp_path / "mine.yaml")).startswith("mine.yaml: sft.epochs: found \"five\"")


@pytest.mark.parametrize("text, words", [
    ("seed: 0\nseed: 1", "key 'seed' comes twice"), ("a: [", "line"), ("- 1", "found list"), ("", "NoneType"),
])
def test_a_broken_file_is_refused(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    assert words in refusal(name=str(tmp_path / "mine.yaml"))


def test_an_unknown_preset_is_refused():
    assert "did you mean tiny?" in refusal(name="tyni")
    assert "h100, tiny" in refusal(name="nowhere.yaml")


def test_numbers_without_a_dot_are_numbers():
    assert load_preset("tiny", ["sft.learning_rate=1e-3"]).sft.learning_rate == 1e-3
    assert load_preset("tiny", ["budget.wait=Hmm"]).budget.wait == "Hmm"


def test_a_preset_cannot_be_changed_after_loading():
    with pytest.raises(ValueError):
        load_preset("tiny").seed = 1


def test_every_value_has_a_description():
    def fields(section):
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)
            else:
                yield name, field.description
    assert not [name for name, text in fields(type(load_preset("tiny"))) if not text]


def test_atomic_keeps_the_old_file_when_interrupted(tmp_path):
    target = tmp_path / "pool.parquet"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(target) as aside:
        aside.write_text("ne")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_atomic_replaces_a_folder(tmp_path):
    for content in ("old", "new"):
        with atomic(tmp_path / "base") as aside:
            aside.mkdir()
            (aside / f"{content}.txt").write_text(content)
    assert [f.name for f in (tmp_path / "base").iterdir()] == ["new.txt"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    target = tmp_path / "numbers.csv"
    target.write_text("old")
    program = ("import sys, time; from pathlib import Path; from s1book.config import atomic\n"
               "with atomic(Path(sys.argv[1])) as aside:\n"
               "    aside.write_text('half'); print('written', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.kill()
    process.wait()
    assert target.read_text() == "old"
    with atomic(target) as aside:
        aside.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(S1Error, match="the disk is full"):
        append_jsonl(Path("/dev/full"), {"a": 1})
    with pytest.raises(S1Error, match="the disk is full"), atomic(tmp_path / "a.csv") as aside:
        aside.symlink_to("/dev/full")
        aside.write_text("x" * 10_000)
    assert not list(tmp_path.iterdir())


def test_a_torn_last_record_is_cut_off(tmp_path):
    path = tmp_path / "traces.jsonl"
    for i in range(3):
        append_jsonl(path, {"i": i})
    whole = path.read_bytes()
    for cut in range(1, 9):
        path.write_bytes(whole[:-cut])
        append_jsonl(path, {"i": 9})
        kept = [0, 1, 2] if cut == 1 else [0, 1]  # cut == 1 loses only the newline
        assert [r["i"] for r in read_jsonl(path)] == [*kept, 9]


@pytest.mark.parametrize("middle", [b'{"i": \n', b"3\n", b"\xff\xfe\n", b"\x00\x00\n"])
def test_damage_in_the_middle_names_file_and_line(tmp_path, middle):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"i": 0}\n' + middle + b'{"i": 2}\n')
    with pytest.raises(S1Error, match=r"traces\.jsonl, line 2: found .* wanted a JSON object"):
        read_jsonl(path)


def test_a_record_is_plain_data(tmp_path):
    with pytest.raises(ValueError):
        append_jsonl(tmp_path / "a.jsonl", {"loss": float("nan")})
    assert not (tmp_path / "a.jsonl").exists()


def test_item_seeds_do_not_depend_on_order():
    seeds = [item_seed(0, i) for i in range(5000)]
    assert len(set(seeds)) == 5000 and all(0 <= s < 2**63 for s in seeds)
    assert item_seed(0, 7) == seeds[7] and item_seed(1, 7) != seeds[7] != item_seed(0, "7x")
    bits = [random.Random(s).random() < 0.5 for s in seeds]
    assert 2350 < sum(bits) < 2650


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project; returns a function that opens its tiny run."""
    monkeypatch.setenv("S1BOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("S1BOOK_RUN", raising=False)
    return tmp_path


def test_read_prefers_the_run_and_announces_the_record(project, capsys):
    run = Run.open("tiny")
    assert not run.dir.exists()
    (project / "data" / "reference").mkdir(parents=True)
    (project / "data" / "reference" / "funnel.csv").write_text("stage\n")
    assert run.read("funnel.csv") == project / "data" / "reference" / "funnel.csv"
    assert "data/reference/funnel.csv" in capsys.readouterr().out
    run.write("funnel.csv").write_text("stage\n")
    assert run.read("funnel.csv") == project / "runs" / "tiny" / "funnel.csv"
    assert capsys.readouterr().out == ""


def test_another_preset_never_reads_what_tiny_recorded(project):
    (project / "data" / "reference").mkdir(parents=True)
    (project / "data" / "reference" / "funnel.csv").write_text("stage\n")
    with pytest.raises(MissingArtefact):
        Run.open("h100").read("funnel.csv")


def test_a_missing_artefact_names_the_chapter(project):
    with pytest.raises(FileNotFoundError, match="chapter 07 makes it; run: s1book run --preset tiny --from 07"):
        Run.open("tiny").read("s1k/train.parquet")


@pytest.mark.parametrize("name, content", [
    ("pool.parquet", b"PAR1 cut"), ("pool.parquet", b""), ("traces.jsonl", b"\x00\x00\x00\x00"),
    ("run_card.json", b"<html>"), ("curve.png", b"GIF89a"),
])
def test_a_damaged_artefact_is_refused(project, name, content):
    run = Run.open("tiny")
    run.write(name).write_bytes(content)
    with pytest.raises(S1Error, match="is damaged: .*; delete it and run: s1book run"):
        run.read(name)


def test_a_model_folder_without_weights_is_refused(project):
    run = Run.open("tiny")
    run.write("base/config.json").write_text("{}")
    with pytest.raises(S1Error, match="its weights .* are missing; delete it and run: .* --from 01"):
        run.read("base")
    run.write("base/model.safetensors").write_bytes(b"x")
    assert run.read("base") == run.dir / "base"


def test_models_are_artefacts_or_hub_names(project):
    (project / "data" / "tiny" / "base").mkdir(parents=True)
    (project / "data" / "tiny" / "base" / "model.safetensors").write_bytes(b"x")
    assert Run.open("tiny").model("base") == str(project / "data" / "tiny" / "base")
    assert Run.open("h100").model("small") == "Qwen/Qwen2.5-7B-Instruct"


def test_paths_for_people_do_not_name_the_machine(project):
    assert show_path(project / "runs" / "x.csv") == "runs/x.csv"
    assert show_path("/somewhere/else/x.csv") == "x.csv"
    assert str(project) not in repr(Run.open("tiny"))


def test_weights_are_compared_with_their_checksums(tmp_path):
    assert not check_weights(tmp_path).ok
    (tmp_path / "w.bin").write_bytes(b"weights")
    import hashlib
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(b'weights').hexdigest()}  w.bin\n")
    assert check_weights(tmp_path).ok
    (tmp_path / "w.bin").write_bytes(b"Weights")
    assert check_weights(tmp_path).found == "w.bin altered"
    (tmp_path / "w.bin").unlink()
    assert check_weights(tmp_path).found == "w.bin missing"


def test_the_doctor_looks_for_the_gpu():
    rows = {row.what: row for row in doctor(Run.open("h100"))}
    import torch
    assert rows["device"].ok == (torch.cuda.device_count() >= 8) and rows["device"].stops
    assert {row.what: row for row in doctor(Run.open("tiny"))}["device"].ok


def test_the_estimates_agree_with_what_is_known():
    p = load_preset("h100", ["sft.max_length=32768", "sft.mean_length=4700"])
    assert abs(parameters(p.model.shape) / 32.76e9 - 1) < 0.01  # Qwen2.5-32B
    assert abs(train_seconds(p) / 60 - 26) < 1  # paper appendix D
    assert all(isinstance(v, str) for v in estimates(p).values())
    full = load_preset("h100", ["pool.size=59029", "select.size=59029", "sft.mean_length=3600"])
    assert 0.5 < train_seconds(full) / 3600 * full.launch.devices / 394 < 2  # exercise 4 of chapter 00


def test_parameters_are_those_of_a_real_model():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = load_preset("tiny").model.shape
    config = Qwen2Config(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, vocab_size=shape.vocabulary,
        intermediate_size=shape.intermediate, num_key_value_heads=shape.kv_heads,
        num_attention_heads=shape.hidden // shape.head_dim, tie_word_embeddings=False)
    with torch.device("meta"):
        matrices = [w for w in Qwen2ForCausalLM(config).parameters() if w.dim() == 2]
    assert sum(w.numel() for w in matrices) == parameters(shape)


def test_the_tiny_shape_is_that_of_the_shipped_model():
    file = Path("data/tiny/base/config.json")
    if not file.exists():
        pytest.skip("no shipped base model in this checkout")
    config, shape = json.loads(file.read_text()), load_preset("tiny").model.shape
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (
        shape.layers, shape.hidden, shape.vocabulary)


@pytest.mark.parametrize("preset, changes, words", [
    ("h100", SIXTEEN[:1], 'teacher.kind: found "recorded", wanted openai'),
    ("h100", SIXTEEN[:2], 'features.domain: found "declared", wanted llm'),
    ("tiny", SIXTEEN[::2], 'teacher.kind: found "tiny", wanted openai')])
def test_the_sixteen_sources_need_a_teacher_and_a_classifier(preset, changes, words):
    """They hold no traces, and most of them declare no domain."""
    with pytest.raises(PresetError, match=words):
        load_preset(preset, changes)
    assert load_preset(preset, SIXTEEN).features.domain == "llm"


def test_packed_records_are_read_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(whole := gzip.compress(b'{"i": 0}\n' * 3))
    assert read_jsonl(path) == [{"i": 0}] * 3
    for bad in (whole[:-9], whole[:-3] + b"xyz", b"no gzip", gzip.compress(b'{"i": 0}\n{"i"')):
        path.write_bytes(bad)
        with pytest.raises(S1Error, match="records.jsonl.gz"):
            read_jsonl(path)
        assert path.read_bytes() == bad


def test_long_records_are_recorded_once_and_found_packed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path))
    path = Run.open("tiny").read("records.jsonl")
    assert show_path(path) == "data/reference/seeds/0/records.jsonl.gz" and show_path(path) in capsys.readouterr().out
    assert read_jsonl(path)[0]["benchmark"]
    assert not (project_root() / "data/reference/records.jsonl").exists()
    for name in ("pool_ledger.csv", "near_duplicates.csv"):
        assert Run.open("tiny").read(name).is_file()
    assert all(".gz" not in place.name or "h100" in str(place) for place in RunFolder("h100", None, tmp_path).places("records.jsonl"))


def test_failed_items_are_asked_anew_only_if_the_preset_says_so():
    assert [load_preset("tiny", change).teacher.again for change in ([], ["teacher.again=true"])] == [False, True]
