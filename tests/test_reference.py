"""Every recorded figure follows from the recorded generations: data/reference holds no number on trust."""

import io
import json

import pandas as pd
import pytest

from s1book.config import project_root, read_jsonl
from s1book.grade import grade
from s1book.pretraining import SIZES, make_tokenizer
from s1book.scaling import scaling_table
from s1book.stats import accuracy_table, flips
from s1book.tiny import benchmarks
from s1book.world import HEADERS

REFERENCE = project_root() / "data" / "reference"
SEEDS = [0, 1, 2]
FORCING = ["max=0", "natural", "wait=1", "wait=2", "wait=4"]


@pytest.fixture(scope="module")
def records():
    frames = {seed: pd.read_json(REFERENCE / "seeds" / str(seed) / "records.jsonl.gz", lines=True,
                                 dtype=False) for seed in SEEDS}
    return {seed: frame.astype(object).where(frame.notna(), None).to_dict("records")
            for seed, frame in frames.items()}


def as_written(table: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy_tables_follow_from_the_records(records, seed):
    recorded = pd.read_csv(REFERENCE / "seeds" / str(seed) / "accuracy.csv")
    made = as_written(accuracy_table(records[seed]))[recorded.columns]
    pd.testing.assert_frame_equal(made, recorded, rtol=0, atol=1e-5)  # six decimals are written


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_tables_follow_from_the_records(records, seed):
    recorded = pd.read_csv(REFERENCE / "seeds" / str(seed) / "scaling.csv")
    made = as_written(scaling_table(records[seed]))[recorded.columns]
    pd.testing.assert_frame_equal(made, recorded, rtol=0, atol=1e-4)  # four are written


@pytest.mark.parametrize("seed", SEEDS)
def test_grades_and_token_counts_follow_from_the_texts(records, seed):
    tokenizer = make_tokenizer()
    gold = {row["id"]: row for rows in benchmarks().values() for row in rows}
    for record in records[seed]:
        row = gold[record["id"]]
        assert record["gold"] == row["answer"]
        if record["setting"] != "base-plain":  # plain text has a reader of its own in chapter 01
            again = grade(row, record["answer_text"])
            assert (again.extracted, bool(again.correct)) == (record["extracted"], record["correct"])
        assert record["correct"] == (record["extracted"] == row["answer"])
        if record["model"] == "sft":
            assert len(tokenizer(record["text"])["input_ids"]) == record["thinking_tokens"]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_has_every_setting_once(records, seed):
    frame = pd.DataFrame(records[seed])
    assert not frame.duplicated(["benchmark", "id", "setting"]).any()
    counts = frame.groupby(["benchmark", "setting"]).id.nunique().unstack()
    assert counts.loc["tiny_hard"].eq(30).all() and counts.loc["tiny_mixed"].eq(500).all()
    assert counts.loc["tiny_choice"].eq(198).all() and set(FORCING) <= set(counts)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_phenomenon_that_the_chapters_tell_of(records, seed):
    """What README and chapters say of the tiny world, on the mixed benchmark (n = 500)."""
    table = accuracy_table(records[seed]).set_index(["benchmark", "setting"]).accuracy["tiny_mixed"]
    assert table["natural"] > table["base"] + 0.1 and table["natural"] > table["max=0"] + 0.3
    assert table["wait=1"] > table["base"] + 0.25 and table["wait=1"] > table["newline=1"] + 0.05
    assert abs(table["wait=2"] - table["wait=1"]) < 0.06 and table["wait=4"] > table["natural"] - 0.03  # it levels off
    change = flips(records[seed], "natural", "wait=1").set_index("benchmark").loc["tiny_mixed"]
    assert change.wrong_to_right > change.right_to_wrong and change.low > 0


def test_the_spread_of_the_bases_is_recorded():
    spread = pd.read_csv(REFERENCE / "base_spread.csv")
    assert set(spread.seed) == set(SEEDS) and set(spread["items"]) == set(HEADERS)
    live = pd.read_csv(REFERENCE / "base_skill.csv")
    assert spread[spread.seed == 0].right.tolist() == live.right.tolist()


def test_the_run_card_names_the_shipped_model():
    card = json.loads((REFERENCE / "run_card.json").read_text())
    assert card["seed"] == 0 and "tiny_mixed" in json.dumps(card)
    assert set(SIZES) == {"base", "small"} and read_jsonl(REFERENCE / "example_traces.jsonl")


def test_collecting_keeps_every_file_that_a_table_follows_from(tmp_path, monkeypatch):
    from s1book.config import S1Error
    from s1book.runner import KEPT_ONCE, KEPT_PER_SEED, collect

    runs = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for run in runs:
        for name in {*KEPT_ONCE, *KEPT_PER_SEED, "base", "small"}:
            path = run / name
            (path if "." not in name else path.parent).mkdir(parents=True, exist_ok=True)
            (path / "some.json" if "." not in name else path).write_text(f"{run.name}\nmore\n")
    collect(runs, tmp_path / "data")
    for seed in (0, 1):
        kept = {p.relative_to(tmp_path / "data/reference/seeds" / str(seed)).as_posix()
                for p in (tmp_path / "data/reference/seeds" / str(seed)).rglob("*") if p.is_file()}
        assert kept == {name + ".gz" * (name == "records.jsonl") for name in KEPT_PER_SEED}
        assert {"controls/runs.parquet", "controls/table.csv", "parallel/runs.parquet", "parallel/table.csv"} <= kept
        assert (tmp_path / f"data/reference/seeds/{seed}/parallel/runs.parquet").read_text().startswith(f"seed{seed}")
    (runs[1] / "controls/runs.parquet").unlink()
    monkeypatch.setattr("s1book.files.project_root", lambda: tmp_path)  # so that the sentence shows more than the name
    with pytest.raises(S1Error, match="seed1/controls/runs.parquet is missing: run: make reference"):
        collect(runs, tmp_path / "data")
