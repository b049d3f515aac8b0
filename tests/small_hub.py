"""Made-up copies of the sixteen datasets, with the column names and types of the real ones."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ARENA = ("Math", "Physics", "Chemistry", "Biology", "Geography", "Astronomy", "CS")
BENCH = ("OE_TO_maths_en_COMP", "OE_TO_physics_en_COMP", "TP_TO_maths_en_COMP", "TP_TO_physics_en_COMP")
READING = ("sat_en", "sat_math", "lsat_ar", "lsat_lr", "lsat_rc", "logiqa", "aqua_rat", "math_agieval")


def arena(subject, split, **fields):
    return {"id": f"{subject}_{split}", "problem": f"{subject} {split}: how many made-up moons?", "prompt": "",
            "subject": subject, "language": "EN", "modality": "text-only", "answer_type": "NV",
            "answer": None if split == "test" else "7", "solution": None if split == "test" else "Count: 7.",
            **fields}


def bench(config):
    return [{"id": 1, "question": f"{config}: find the made-up force.", "solution": ["It is 5.", "Another way."],
             "final_answer": ["5", "6"] if config[:2] == "OE" else None,
             "context": "A made-up planet has two moons." if "physics" in config else None,
             "question_type": "Open-ended" if config[:2] == "OE" else "Theorem proof",
             "subject": "Physics" if "physics" in config else "Math", "subfield": "Mechanics"}]


def gpqa(i):
    return {"Record ID": f"rec{i}", "Question": f"Which made-up salt number {i} dissolves?", "Correct Answer": f"salt {i}",
            "Incorrect Answer 1": "none", "Incorrect Answer 2": "all", "Incorrect Answer 3": "two",
            "Explanation": f"Salt {i} does.", "Subdomain": "Chemistry (general)", "High-level domain": "Chemistry"}


def scieval(i, task, topic, answer):
    return {"id": f"s{i}", "category": "Biology", "topic": topic, "ability": "Base Knowledge", "type": "multiple-choice",
            "task_name": task, "question": f"Made-up fact {i} of {task}?\n\nA. yes\nB. no\n\nAnswer:", "answer": answer}


def agieval(config, split):
    whole = {"passage": "" if config != "sat_en" else "A made-up passage. ", "question": f"{config} {split} asks what?",
             "options": ["(A)one", "(B)two"], "label": "B", "answer": None, "solution": "Because of two.", "level": None}
    if config != "math_agieval":
        return [whole]
    return [whole | {"level": level, "label": None, "answer": "2", "question": f"Level {level} {split}: 1+1?"}
            for level in (1, 5)]


def live(i, difficulty):
    return {"question_title": f"t{i}", "question_content": f" Write made-up program {i}. \n", "platform": "made-up",
            "question_id": str(i), "contest_date": "2024-01-01", "starter_code": "", "difficulty": difficulty,
            "public_test_cases": "[1]" * 500, "private_test_cases": "x" * 5000, "metadata": "{}"}


def files():
    """Relative file -> rows, as on the hub."""
    math = {"problem": "What is 1 plus 1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra",
            "level": 1, "unique_id": "train/1"}
    numina = [{"source": s, "problem": f"Made-up {s} problem {i}?", "solution": "So $\\boxed{\\frac{1}{2}}$.",
               "messages": [{"role": "user", "content": "again"}]} for i in range(2) for s in ("aops_forum", "cn_k12")]
    tasks = ("SocraticQA", "SocraticQA", "MedQA", "PubMedQA", "reagent selection")
    sci = [scieval(i, task, f"topic {i % 3}" if task == "SocraticQA" else None, ["B"] if i % 7 else None)
           for i, task in enumerate(tasks * 120)]
    aime = [{"ID": f"{y}-1", "Year": y, "Problem Number": 1, "Question": f"In {y}, how many made-up paths?",
             "Answer": str(y % 1000), "Part": ""} for y in (1983, 2021, 2022, 2023, 2024)]
    clues = [{"instruction": "You are an expert.", "input": f"### Input: ### Clue: Made-up clue {i} (4)",
              "output": f"### Answer: WORD{i} ### Explanation: made up"} for i in range(1200)]
    return {
        "simplescaling/openaimath/train.jsonl": [math, math | {"problem": "What is 2 plus 2?", "answer": "4"}],
        "simplescaling/openaimath/test.jsonl": [math | {"problem": "What is 3 plus 3?"}],
        **{f"GAIR/OlympicArena/{s}/{split}-00000-of-00001.parquet":
           [arena(s, split), arena(s, split, language="ZH", problem="zh"), arena(s, split, modality="multi-modal", problem="mm")]
           for s in ARENA for split in ("test", "val")},
        "TIGER-Lab/TheoremQA/test.parquet": [
            {"Question": "Is the made-up set open?", "Answer": "True", "Answer_type": "bool", "Picture": None},
            {"Question": "What does the picture show?", "Answer": "1", "Answer_type": "integer", "Picture": "png"}],
        "AI-MO/NuminaMath-CoT/train.parquet": numina,
        "simplescaling/numinamath_500/train.parquet": [{"problem": "Made-up cn_k12 problem 1?", "solution": "x"}],
        "KbsdJames/Omni-MATH/test.jsonl": [
            {"domain": ["Mathematics -> Algebra -> Other"], "difficulty": 5.0, "problem": "Made-up omni?", "solution": "3.",
             "answer": "3", "source": "made_up"}],
        "OpenDFM/SciEval/test.parquet": sci[:300], "OpenDFM/SciEval/validation.parquet": sci[300:],
        **{f"Hothan/OlympiadBench/{c}/train.parquet": bench(c) for c in BENCH},
        "daman1209arora/jeebench/test.jsonl": [
            {"subject": s, "description": "JEE Adv", "gold": "AC", "index": i, "type": "MCQ(multiple)",
             "question": f"Made-up {s} (A) (B) (C) (D)"} for i, s in enumerate(("math", "phy", "chem"))],
        **{f"baber/agieval/{c}/{split}/0000.parquet": agieval(c, split) for c in READING for split in ("test", "few_shot")},
        "simplescaling/s1-prob/train.jsonl": [{"question": "Made-up martingale?", "solution": "Use $\\boxed{0}$."}],
        "Idavidrein/gpqa/gpqa_extended/train.csv": [gpqa(i) for i in range(40)],
        "Idavidrein/gpqa/gpqa_diamond/train.csv": [gpqa(i) for i in range(5)],
        "0xharib/xword1/train.jsonl": clues,
        "codegenning/usacobench_formatted/test.jsonl": [
            {"id": "1", "question": "\n Made-up cows? ", "input_output": "[]" * 999, "difficulty": "gold"}],
        "simplescaling/s1-teasers/train.jsonl": [{"Question": " Made-up coins? ", "Answer": "11"}],
        **{f"livecodebench/code_generation_lite/test{n}.jsonl": [live(f"{n}{d}", d) for d in ("hard", "easy")]
           for n in ("", 2, 3, 4)},
        "qq8933/AIME_1983_2024/train.csv": aime,
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    """One data file, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def build(root: Path) -> Path:
    """All of them under one folder."""
    for name, rows in files().items():
        write_rows(root / name, rows)
    return root
