"""The sixteen sources, each against a made-up copy with the columns of the real dataset (small_hub.py)."""

import json
import random
import re

import pytest
from datasets import Dataset
from small_hub import ARENA, READING, agieval, arena, build, files, gpqa, live, scieval, write_rows

from s1book.config import S1_SOURCES, S1Error, load_preset, project_root
from s1book.grade import grade_all, options_of
from s1book.pool import collect, near_duplicates, question_hash, read_source
from s1book.sources import (
    CHOICES, SIXTEEN, Part, Store, choose_scieval, common, dataset_source, from_s1k, in_turns, last_box, load_call,
    load_rows, shuffled, sources_for, spread_like_s1,
)

PUBLISHED = {"question": "What is 1 plus 1?", "solution": "2", "source_type": "made/up", "cot_type": "math",
             "deepseek_thinking_trajectory": "one and one", "deepseek_attempt": "Answer: 2"}

# source -> raw rows, rows, and what one question, solution, answer, source_type, cot_type and domain look like.
WANTED = {
    "MATH": (2, 2, ("What is 1 plus 1?", "It is $\\boxed{2}$.", "2", "simplescaling/openaimath/Algebra", "math", "Algebra")),
    "OlympicArena": (42, 14, ("Math val: how many made-up moons?", "Count: 7.", "7", "GAIR/OlympicArena/Math", "math", "Math")),
    "TheoremQA": (2, 1, ("Is the made-up set open?", "True", "True", "TIGER-Lab/TheoremQA/bool", "math", None)),
    "NuminaMath": (4, 3, ("Made-up cn_k12 problem 1?", "So $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}",
                          "AI-MO/NuminaMath-CoT/cn_k12", "math", None)),
    "Omni-MATH": (1, 1, ("Made-up omni?", "3.", "3", "KbsdJames/Omni-MATH", "math", "Algebra")),
    "SciEval": (600, 250, (None, "B", "B", "OpenDFM/SciEval/Biology/multiple-choice/MedQA", "health science", "Biology")),
    "OlympiadBench": (4, 4, ("A made-up planet has two moons.\n\nOE_TO_physics_en_COMP: find the made-up force.", "It is 5.",
                             "5, 6", "Hothan/OlympiadBench/Open-ended/Physics", "math", "Mechanics")),
    "JEEBench": (3, 3, ("Made-up chem (A) (B) (C) (D)", "AC", "AC", "daman1209arora/jeebench/chem", "science", "Chemistry")),
    "AGIEval": (18, 16, ("A made-up passage.\n\nsat_en test asks what?\n(A)one\n(B)two", "Because of two.", "B",
                         "baber/agieval/sat_en", "english", None)),
    "StatsQual": (1, 1, ("Made-up martingale?", "Use $\\boxed{0}$.", "0", "simplescaling/s1-prob", "math", "probability")),
    "GPQA": (40, 35, (None, None, None, "Idavidrein/gpqa", "science", "Chemistry (general)")),
    "XWord": (1200, 1000, (None, None, None, "0xharib/xword1", "crossword", None)),
    "USACO": (1, 1, ("Made-up cows?", None, None, "codegenning/usacobench_formatted", "coding", None)),
    "Quant": (1, 1, ("Made-up coins?", "11", "11", "simplescaling/s1-teasers", "math", None)),
    "LiveCodeBench": (6, 3, ("Write made-up program 2hard.", None, None, "LiveCodeBench/release_v2", "coding", None)),
    "AIME": (5, 2, ("In 2021, how many made-up paths?", "21", "21", "qq8933/AIME_1983_2024", "math", None)),
}


SCIEVAL = "OpenDFM/SciEval/Biology/multiple-choice/"
KINDS = {  # cot_type -> source types, as data/collect_data.py writes them
    "math": "simplescaling/openaimath/Algebra GAIR/OlympicArena/Math TIGER-Lab/TheoremQA/bool AI-MO/NuminaMath-CoT/aops_forum "
            "AI-MO/NuminaMath-CoT/cn_k12 KbsdJames/Omni-MATH daman1209arora/jeebench/math daman1209arora/jeebench/phy "
            "Hothan/OlympiadBench/Open-ended/Math Hothan/OlympiadBench/Open-ended/Physics simplescaling/s1-prob "
            "Hothan/OlympiadBench/Theorem_proof/Math Hothan/OlympiadBench/Theorem_proof/Physics "
            "baber/agieval/sat_math baber/agieval/logiqa baber/agieval/aqua_rat baber/agieval/math_agieval "
            "simplescaling/s1-teasers qq8933/AIME_1983_2024",
    "english": "baber/agieval/sat_en baber/agieval/lsat_ar baber/agieval/lsat_lr baber/agieval/lsat_rc",
    "coding": "GAIR/OlympicArena/CS codegenning/usacobench_formatted " + " ".join(f"LiveCodeBench/release_v{i}" for i in (1, 2, 3)),
    "science": " ".join(f"GAIR/OlympicArena/{s}" for s in ("Physics", "Chemistry", "Biology", "Geography", "Astronomy"))
               + f" {SCIEVAL}SocraticQA {SCIEVAL}reagent_selection daman1209arora/jeebench/chem Idavidrein/gpqa",
    "health science": f"{SCIEVAL}MedQA {SCIEVAL}PubMedQA",
    "crossword": "0xharib/xword1",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hub"))


def section(hub, *changes):
    return load_preset("tiny", ["pool.source=s1-sources", "teacher.kind=openai", "features.domain=llm", f"pool.folder={hub}", *changes]).pool


def one(hub, name, *changes):
    [source] = sources_for(section(hub, f"pool.only=[{name}]", *changes), 0)
    return source


def test_the_names_of_presets_are_the_names_of_entries_and_of_table_7():
    assert tuple(SIXTEEN) == S1_SOURCES == tuple(WANTED) and len(S1_SOURCES) == 16
    table = (project_root() / "data/paper/table7.csv").read_text()
    assert all(f"\n{entry.in_paper}," in table for entry in SIXTEEN.values())
    assert len({entry.in_paper for entry in SIXTEEN.values()}) == 16


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("name", S1_SOURCES)
def test_a_source_from_a_local_copy(hub, name, streaming):
    rows, raw = read_source(one(hub, name, f"pool.streaming={streaming}"))
    wanted_raw, wanted_rows, example = WANTED[name]
    assert (raw, len(rows)) == (wanted_raw, wanted_rows)
    fields = ("question", "solution", "answer", "source_type", "cot_type", "domain")
    fits = [row for row in rows if all(want in (None, row[f]) for f, want in zip(fields, example, strict=True))]
    assert fits
    nothing = [f for f, want in zip(fields, example, strict=True) if want is None]
    if name in ("USACO", "LiveCodeBench"):
        assert all(fits[0][f] is None for f in ("solution", "answer", "domain")) and "domain" in nothing
    assert all(json.loads(row["metadata"])["part"] for row in rows)


@pytest.mark.parametrize("name, options", [("SciEval", "AB"), ("JEEBench", "ABCD"), ("AGIEval", "AB"), ("GPQA", "ABCD")])
def test_the_options_of_a_source_are_found_where_its_answers_are_letters(hub, name, options):
    rows = [row for row in read_source(one(hub, name))[0] if re.fullmatch("[A-Z]+", row["answer"])]
    assert rows and {options_of(row) for row in rows} == {options}
    for row, graded in zip(rows, grade_all((row, f"So it is ({row['answer'][0]}).") for row in rows)):
        assert graded.correct == (len(row["answer"]) == 1)


@pytest.mark.parametrize("name", S1_SOURCES)
def test_every_column_that_a_source_needs_is_missed_by_name(hub, name):
    source = one(hub, name)
    rows = list(source.load())
    for lost in source.columns:
        changed = [{("new_" + lost if k == lost else k): v for k, v in raw.items()} for raw in rows]
        other = type(source)(source.name, lambda c=changed: c, source.columns, source.to_row, source.choose)
        with pytest.raises(S1Error, match=f"source {name}: column {re.escape(lost)} is missing"):
            read_source(other)


@pytest.mark.parametrize("name, lost", [(name, lost) for name, entry in SIXTEEN.items() for lost in entry.somewhere])
def test_a_column_that_no_part_has_any_more_is_missed_by_name(tmp_path, name, lost):
    for file, rows in files().items():
        write_rows(tmp_path / file, [{("new_" + k if k == lost else k): v for k, v in row.items()} for row in rows])
    with pytest.raises(S1Error, match=f"source {name}: (column {lost} is missing in all|cannot be read; .* KeyError: '{lost}')"):
        read_source(one(tmp_path, name))


@pytest.mark.parametrize("rules", ["s1book", "s1"])
def test_every_kind_of_question_has_the_kind_of_reasoning_that_the_script_gives_it(hub, rules):
    rows = [row for name in S1_SOURCES for row in read_source(one(hub, name, f"pool.rules={rules}"))[0]]
    found = {(row["source_type"].replace(" ", "_"), row["cot_type"]) for row in rows}
    assert found == {(name, kind) for kind, names in KINDS.items() for name in names.split()}
    assert all(row["question"].startswith("Solve the crossword puzzle.") == (row["cot_type"] == "crossword") for row in rows)


@pytest.mark.parametrize("rules", ["s1book", "s1"])
def test_parts_are_read_in_the_order_of_the_script(hub, rules):
    """Olympiads split by split, reading configuration by configuration: equal questions are credited to the first."""
    arena, reading = (read_source(one(hub, name, f"pool.rules={rules}"))[0] for name in ("OlympicArena", "AGIEval"))
    assert [row["question"].split(":")[0] for row in arena] == [f"{subject} {split}" for split in ("test", "val") for subject in ARENA]
    splits = [re.search(r"(?<!\w)(test|few_shot)\b", row["question"])[0] for row in reading]
    assert splits == ["test", "few_shot"] * len(READING) and reading[0]["source_type"] == "baber/agieval/sat_en"


@pytest.mark.parametrize("level, kept", [(4, False), ("4", False), (5, True), ("5", True), (6, False)])
def test_only_the_hardest_level_of_agievals_maths_stays(level, kept):
    raw = agieval("math_agieval", "test")[1] | {"part": "math_agieval", "level": level}
    assert all((SIXTEEN["AGIEval"].to_row(raw, rules) is not None) == kept for rules in ("s1book", "s1"))


def test_the_loop_of_the_script_shares_one_budget_between_topics_and_their_task():
    order = [scieval(i, task, topic, ["A"]) for i, (task, topic) in enumerate(
        [("SocraticQA", "a"), ("SocraticQA", "a"), ("MedQA", None), ("MedQA", None), ("SocraticQA", "b")])]
    assert [row["id"] for row in spread_like_s1(order, 4)] == ["s0", "s0", "s2", "s2"]


@pytest.mark.parametrize("name", S1_SOURCES)
def test_a_source_that_is_not_there_is_refused_by_name(tmp_path, name):
    with pytest.raises(S1Error, match=f"source {name}: cannot be read"):
        read_source(one(tmp_path, name))


def test_the_rest_go_on_only_if_asked_to(tmp_path, capsys):
    for name, rows in files().items():
        if name.startswith(("daman", "Idavidrein")):
            write_rows(tmp_path / name, rows)
    sources = sources_for(section(tmp_path, "pool.only=[JEEBench, GPQA, USACO]"), 0)
    with pytest.raises(S1Error, match="source USACO: cannot be read"):
        collect(sources)
    found = collect(sources, missing="skip")
    assert [(line["source"], line["after_near"], line["refused"]) for line in found.ledger] == [
        ("JEEBench", 3, ""), ("GPQA", 35, ""), ("USACO", 0, "source USACO: cannot be read")]
    assert "We go on without a source. source USACO" in capsys.readouterr().out
    with pytest.raises(S1Error, match="the pool is empty"):
        collect(sources_for(section(tmp_path, "pool.only=[USACO]"), 0), missing="skip")


def test_all_sixteen_at_once(hub):
    found = collect(sources_for(section(hub), 0))
    assert [line["source"] for line in found.ledger] == list(S1_SOURCES)
    assert [line["rows_in"] for line in found.ledger] == [raw for raw, *_ in WANTED.values()]
    assert len({row["question_hash"] for row in found.rows}) == len(found.rows)
    assert all(row["question_hash"] == question_hash(row["question"]) for row in found.rows)


def test_streaming_changes_no_row(hub):
    loaded, streamed = (collect(sources_for(section(hub, f"pool.streaming={s}"), 0)) for s in ("false", "true"))
    assert loaded == streamed


@pytest.mark.parametrize("saved", [False, True])
def test_streaming_really_streams(tmp_path, saved):
    from datasets import IterableDataset
    data = Dataset.from_list([PUBLISHED])
    data.save_to_disk(tmp_path) if saved else data.to_parquet(tmp_path / "train.parquet")
    assert isinstance(load_rows(Part(str(tmp_path)), Store(streaming=True)), IterableDataset)
    assert isinstance(load_rows(Part(str(tmp_path)), Store()), Dataset)


def test_numina_keeps_the_forum_and_the_listed_rows(hub):
    rows, _ = read_source(one(hub, "NuminaMath"))
    assert sorted(row["question"] for row in rows) == [
        "Made-up aops_forum problem 0?", "Made-up aops_forum problem 1?", "Made-up cn_k12 problem 1?"]
    assert "messages" not in json.loads(rows[0]["metadata"])


def test_aime_stops_where_the_paper_or_the_script_stops(hub):
    years = lambda rules: [json.loads(row["metadata"])["Year"] for row in read_source(one(hub, "AIME", f"pool.rules={rules}"))[0]]
    assert years("s1book") == [1983, 2021] and years("s1") == [1983, 2021, 2022]


def test_gpqa_leaves_its_benchmark_out_and_changes_the_text_before_it_is_hashed(hub):
    rows, _ = read_source(one(hub, "GPQA"))
    firsts = [row["question"].splitlines()[0] for row in rows]
    assert firsts == [gpqa(i)["Question"] for i in range(5, 40)]
    for row in rows:
        lines = row["question"].splitlines()
        number = json.loads(row["metadata"])["Correct Answer"]
        assert lines[1] == "Answer Choices:" and lines["ABCD".index(row["answer"]) + 2] == f"({row['answer']}) {number}"
        assert row["solution"].endswith(f" does.\n\nAnswer: {row['answer']}")
    assert {row["answer"] for row in rows} == set("ABCD")


def test_gpqa_shuffles_each_question_alone_or_all_with_one_generator(hub):
    orders = {}
    for rules in ("s1book", "s1"):
        source = one(hub, "GPQA", f"pool.rules={rules}")
        raw = list(source.load())
        letters = [[source.to_row(row)["answer"] for row in source.choose(rows)] for rows in (raw, raw[:5] + raw[6:])]
        orders[rules] = letters[0][1:] == letters[1]  # one row fewer: are the others as before?
    assert orders == {"s1book": True, "s1": False}
    one_generator = random.Random(42)
    order = list(CHOICES)
    one_generator.shuffle(order)
    first = next(iter(one(hub, "GPQA", "pool.rules=s1").choose(raw)))
    assert first["order"] == order


def test_olympiadbench_puts_the_context_before_the_question_unless_it_follows_the_script(hub):
    mended, script = (read_source(one(hub, "OlympiadBench", f"pool.rules={rules}"))[0] for rules in ("s1book", "s1"))
    assert sum(row["question"].startswith("A made-up planet") for row in mended) == 2
    assert not any(row["question"].startswith("A made-up planet") for row in script)
    assert [row["answer"] for row in mended] == ["5, 6", "5, 6", "It is 5.", "It is 5."]


def test_agieval_sets_passages_apart_shows_options_and_takes_the_hardest_maths(hub):
    mended, script = ({row["source_type"].split("/")[2]: row["question"] for row in
                       read_source(one(hub, "AGIEval", f"pool.rules={rules}"))[0]} for rules in ("s1book", "s1"))
    assert mended["sat_en"].startswith("A made-up passage.\n\nsat_en") and script["sat_en"].startswith("A made-up passage.sat_en")
    assert mended["aqua_rat"].endswith("(B)two") and script["aqua_rat"].endswith("asks what?")
    assert mended["math_agieval"] == script["math_agieval"] == "Level 5 few_shot: 1+1?"


def test_scieval_takes_turns_and_never_a_row_twice():
    rows = [scieval(i, task, f"t{i % 3}" if task == "SocraticQA" else None, ["A"]) for i, task in
            enumerate(["SocraticQA"] * 900 + ["MedQA"] * 300 + ["PubMedQA"] * 10 + ["reagent selection"] * 300)]
    ours, script = choose_scieval(rows, "s1book"), choose_scieval(rows, "s1")
    count = lambda taken, key, value: sum(row[key] == value for row in taken)
    assert len(ours) == len({row["id"] for row in ours}) == 250
    assert [count(ours, "task_name", t) for t in ("SocraticQA", "MedQA", "PubMedQA", "reagent selection")] == [80, 80, 10, 80]
    assert {count(ours, "topic", f"t{i}") for i in range(3)} <= {26, 27}
    assert len({row["id"] for row in script}) < len(script) <= 252  # the loop of the script takes some twice
    assert choose_scieval(rows, "s1book") == ours and not choose_scieval([r | {"answer": None} for r in rows], "s1book")


def test_scieval_reads_without_the_end_of_the_prompt(hub):
    rows, _ = read_source(one(hub, "SciEval"))
    assert all(row["question"].endswith("\nB. no") for row in rows)
    raw = scieval(0, "reagent selection", None, ["CO"]) | {"question": "Given a.\nOptimal ligand:"}
    assert SIXTEEN["SciEval"].to_row(raw, "s1book")["question"] == "Given a.\nWhat is the optimal ligand?"


def test_crosswords_are_the_first_thousand_of_the_seeded_order(hub):
    rows, _ = read_source(one(hub, "XWord"))
    lines = Dataset.from_list(files()["0xharib/xword1/train.jsonl"]).shuffle(seed=42)[:1000]["input"]
    assert [row["question"].split("\n\n")[1] for row in rows] == [line.split("### Clue: ")[1] for line in lines]
    assert rows[0]["answer"].startswith("WORD") and rows[0]["solution"].startswith("### Answer: WORD")


def test_a_shared_instruction_does_not_make_two_clues_one():
    clues = [SIXTEEN["XWord"].to_row({"input": f"### Clue: {clue} (4)", "output": ""}, "s1book") for clue in ("Ape", "Bee", "Cow")]
    rows = [row | {"question_hash": question_hash(row["question"])} for row in clues]
    assert [pair["similarity"] for pair in near_duplicates(rows, 0.8)] == [0.8095, 0.8095]  # so 0.8 is too low for them
    assert near_duplicates(rows, 0.85) == []


def test_the_seeded_order_is_that_of_datasets():
    rows = [{"at": i} for i in range(100)]
    assert shuffled(rows) == list(Dataset.from_list(rows).shuffle(seed=42))


def test_test_cases_do_not_travel_in_the_metadata(hub):
    rows = read_source(one(hub, "LiveCodeBench"))[0] + read_source(one(hub, "USACO"))[0]
    assert max(len(row["metadata"]) for row in rows) < 400
    assert {row["source_type"] for row in rows} >= {f"LiveCodeBench/release_v{i}" for i in (1, 2, 3)}


def test_a_filter_that_nothing_passes_is_a_changed_dataset(tmp_path):
    for name, rows in files().items():
        if name.startswith("GAIR"):
            write_rows(tmp_path / name, [row | {"language": "English"} for row in rows])
    with pytest.raises(S1Error, match="source OlympicArena: none of its 42 rows passes its filters"):
        read_source(one(tmp_path, "OlympicArena"))


def test_a_column_of_another_type_is_refused_by_name(tmp_path):
    write_rows(tmp_path / "simplescaling/s1-teasers/train.jsonl", [{"Question": ["a list"], "Answer": "1"}])
    with pytest.raises(S1Error, match="source Quant: cannot be read; after 1 rows: AttributeError"):
        read_source(one(tmp_path, "Quant"))


def test_a_torn_file_is_refused_by_name(hub, tmp_path):
    torn = tmp_path / "TIGER-Lab/TheoremQA/test.parquet"
    torn.parent.mkdir(parents=True)
    torn.write_bytes((hub / "TIGER-Lab/TheoremQA/test.parquet").read_bytes()[:-60])
    for streaming in ("false", "true"):
        with pytest.raises(S1Error, match="source TheoremQA: cannot be read"):
            read_source(one(tmp_path, "TheoremQA", f"pool.streaming={streaming}"))


def test_a_blank_question_is_left_out():
    assert common({}, "  ", "s", "a", "t", "math") is None and common({}, None, "s", "a", "t", "math") is None


@pytest.mark.parametrize("text, box", [
    ("so $\\boxed{2}$", "2"), ("\\boxed{1} and \\boxed{\\frac{a}{b}}", "\\frac{a}{b}"), ("\\boxed{", None), ("none", None),
    ("\\boxed{}", ""), ("\\boxed{\\{1\\}}", "\\{1\\}")])
def test_the_last_box(text, box):
    assert last_box(text) == box


def test_in_turns():
    rows = [{"k": k, "i": i} for i, k in enumerate("aaabbc")]
    assert "".join(row["k"] for row in in_turns(rows, "k")) == "abcaba"
    assert sorted(row["i"] for row in in_turns(rows, "k")) == list(range(6))


@pytest.mark.parametrize("name", S1_SOURCES)
def test_what_is_asked_of_the_hub(name):
    """The hub cannot be reached from here; the call at least names dataset, configuration, split and files."""
    for part in SIXTEEN[name].parts:
        call = load_call(part, Store())
        if part.files:
            assert call["path"] in ("json", "parquet") and call["split"] == "train"
            assert call["data_files"] == f"hf://datasets/{part.path}@{part.branch}/{part.files}"
        else:
            assert call == {"path": part.path, "name": part.config, "split": part.split}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "save_to_disk", "readme"])
def test_published_rows_from_a_local_folder(tmp_path, kind, streaming):
    data = Dataset.from_list([PUBLISHED, PUBLISHED | {"question": "What is 2 plus 2?", "solution": "4"}])
    place = tmp_path / "owner" / "set"
    place.mkdir(parents=True)
    if kind == "save_to_disk":
        data.save_to_disk(place)
    elif kind == "jsonl":
        data.to_json(place / "x.jsonl")
    else:
        data.to_parquet(place / "x.parquet")
    if kind == "readme":  # as a snapshot of the hub comes: the card says which files are which split
        (place / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n"
                                         "  - split: train\n    path: x.parquet\n---\n")
    for pool in (["pool.source=owner/set", f"pool.folder={tmp_path}"], [f"pool.source={place}"]):
        [hub] = sources_for(load_preset("tiny", [*pool, f"pool.streaming={str(streaming).lower()}"]).pool, 0)
        (first, second), raw = read_source(hub)
        assert raw == 2 and first["answer"] == first["solution"] == "2" and first["domain"] == "math"
        assert first["question_hash"] == question_hash(PUBLISHED["question"]) and second["answer"] == "4"
        assert json.loads(first["metadata"])["deepseek_attempt"] == "Answer: 2"


def test_configurations_of_a_snapshot_are_those_of_its_card(tmp_path):
    place = tmp_path / "GAIR/OlympicArena"
    write_rows(place / "data/m-val.parquet", [arena("Math", "val")])
    (place / "README.md").write_text("---\nconfigs:\n- config_name: Math\n  data_files:\n"
                                     "  - split: val\n    path: data/m-val.parquet\n---\n")
    rows = list(load_rows(Part("GAIR/OlympicArena", "val", "Math"), Store(str(tmp_path))))
    assert [row["problem"] for row in rows] == ["Math val: how many made-up moons?"]


def test_a_saved_dataset_with_configurations(tmp_path):
    from datasets import DatasetDict
    saved = DatasetDict({"val": Dataset.from_list([arena("Math", "val")])})
    saved.save_to_disk(tmp_path / "GAIR/OlympicArena/Math")
    for streaming in (False, True):
        rows = list(load_rows(Part("GAIR/OlympicArena", "val", "Math"), Store(str(tmp_path), streaming)))
        assert [row["subject"] for row in rows] == ["Math"]


@pytest.mark.parametrize("lost", ["question", "solution", "cot_type", "source_type"])
def test_a_changed_column_of_s1k_is_refused_by_name(tmp_path, lost):
    changed = {("renamed" if name == lost else name): value for name, value in PUBLISHED.items()}
    (tmp_path / "rows.jsonl").write_text(json.dumps(changed) + "\n")
    with pytest.raises(S1Error, match=f"column {lost} is missing; found .*renamed"):
        read_source(dataset_source(str(tmp_path)))


def test_from_s1k_keeps_text_as_it_is():
    assert from_s1k(PUBLISHED | {"question": "a\r\nb  "})["question"] == "a\r\nb  "


def test_the_hard_ones_only():
    easy, hard = (SIXTEEN["LiveCodeBench"].to_row(live(1, d) | {"part": "test.jsonl"}, "s1") for d in ("easy", "hard"))
    assert easy is None and hard["question"] == "Write made-up program 1."
