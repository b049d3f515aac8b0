"""Decontamination: s1's verdicts exactly, better ones of our own, and evidence that holds for each."""

import html
import json
import re
import string
import unicodedata
from collections import defaultdict

import pytest
from hypothesis import example, given, strategies as st

from s1book.config import S1Error, load_preset
from s1book.decontaminate import (
    WORDS, build_index, covered, decontaminate, find_leak, find_leaks, item_words, may_share, runs, shared_runs,
    slow_verdicts, source_of, stretches, word_spans, words_of,
)
from s1book.leaks import evidence_frame, marked, side_by_side, write_leaks
from s1book.plain import FORMS, PLAIN, SIGNS, plain_text, plain_words

METHODS = ["s1", "s1-sequential", "s1book"]

# Few words, so that runs are shared often; odd spaces, capitals, accents and LaTeX, so that reading matters.
PART = st.sampled_from(["a", "A", "b", "b?", "c", "é", "e\u0301", "$a$", r"\frac{a}{b}", r"\left(", "+", "a+b", "\\",
                        " ", "\t", "\n", "\u00a0", "\u2003", "-", "ﬁ", "İ", "Σ", "A) a", "B) b", "C) c"])
TEXT = st.lists(PART, max_size=14).map(" ".join)
TEXTS, ITEMS = st.lists(TEXT, max_size=8), st.lists(TEXT, min_size=1, max_size=4)


def rows(texts, benchmark="bench"):
    return [{"question": text, "benchmark": benchmark, "id": f"{benchmark}-{i}"} for i, text in enumerate(texts)]


def pool_row(text, name="0", source="some/where"):
    return {"question": text, "question_hash": name, "source_type": source}


def pool_rows(texts):
    return [pool_row(text, str(i)) for i, text in enumerate(texts)]


def flagged(leaks):
    return {int(leak.question_hash) for leak in leaks}


# --- slow twins: written from the description, with nothing of the module but what a word is ---

def reference_lookup(texts, n):
    """n-gram -> numbers of the texts, as the reference describes it."""
    lookup = defaultdict(set)
    for number, text in enumerate(texts):
        words = re.sub(r"\s+", " ", text.lower().strip()).split(" ")
        for i in range(len(words) - n + 1):
            lookup[tuple(words[i:i + n])].add(number)
    return lookup


def slow_sequential(pool, benchmark, n):
    """Rebuild both look-ups for every source; append the survivors to the tests. [(source, text)] -> numbers"""
    tests, gone = list(benchmark), set()
    for source in dict.fromkeys(name for name, _ in pool):
        members = [i for i, (name, _) in enumerate(pool) if name == source]
        train, test = reference_lookup([pool[i][1] for i in members], n), reference_lookup(tests, n)
        here = {members[k] for gram in train.keys() & test.keys() for k in train[gram]}
        tests += [pool[i][1] for i in members if i not in here]
        gone |= here
    return gone


def slow_s1book(pool, benchmark, n, coverage):
    """Every question against every item: mark the item's words that lie in a run of the question."""
    gone = set()
    for number, question in enumerate(pool):
        words = plain_words(question)
        for item in benchmark:
            tested, length = item_words(item, "s1book", n)
            inside = [False] * len(tested)
            for i in range(len(tested) - length + 1):
                for j in range(len(words) - length + 1):
                    if tested[i:i + length] == words[j:j + length]:
                        inside[i:i + length] = [True] * length
            if tested and sum(inside) / len(tested) >= coverage:
                gone.add(number)
    return gone


# --- verdicts ---

@given(st.text())
def test_words_are_the_reference_normalisation(text):
    reference = re.sub(r"\s+", " ", text.lower().strip())
    assert words_of(text) == reference.split()


@given(TEXTS, ITEMS, st.integers(1, 5))
def test_s1_gives_the_verdicts_of_the_reference(pool, benchmark, n):
    slow = slow_verdicts(pool, benchmark, n)
    test = reference_lookup(benchmark, n)
    assert slow == {i for gram, where in reference_lookup(pool, n).items() if gram != ("",) and gram in test for i in where}
    assert flagged(decontaminate(pool_rows(pool), rows(benchmark), "s1", n)) == slow


@given(st.lists(st.tuples(st.sampled_from(["a/one", "b/two", "c/three"]), TEXT), max_size=9), ITEMS, st.integers(2, 5))
def test_s1_sequential_gives_the_verdicts_of_the_reference(pool, benchmark, n):
    leaks = decontaminate([pool_row(text, str(i), source) for i, (source, text) in enumerate(pool)],
                          rows(benchmark), "s1-sequential", n)
    assert flagged(leaks) == slow_sequential(pool, benchmark, n)


@given(TEXTS, ITEMS, st.integers(1, 6), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_s1book_gives_the_verdicts_of_its_slow_twin(pool, benchmark, n, coverage):
    leaks = decontaminate(pool_rows(pool), rows(benchmark), "s1book", n, coverage)
    assert flagged(leaks) == slow_s1book(pool, benchmark, n, coverage)


def slow_words(text):
    """Plain words one character and one command after the other."""
    plain = "".join(PLAIN[ord(c)] for c in text)
    plain = "".join(f" {c} " if c in SIGNS else c for c in plain)
    return re.sub(r"\\[a-z]*", lambda found: f" {FORMS[found[0]]} ", plain).split()


LATEX = st.sampled_from(["\\frac", "\\dfrac{1}", "\\leq", "\\sqrt2", "\\text{cm}", "\\", "\\\\", "\\,", "\\É", "x²", "2¼", "^{2}", "≤",
                         "=", "+", "a", "B", "7", " ", "\n", "e\u0301", "ﬁ", "\u212a", "A)", "\0"])


@given(st.one_of(st.text(), st.lists(LATEX, max_size=20).map("".join)))
def test_plain_words_are_those_of_the_slow_twin(text):
    assert plain_words(text) == slow_words(text)


PIECES = st.lists(st.one_of(LATEX, PART), max_size=12).map(" ".join)
CHOICES = st.sampled_from(["", " A) one B) two C) three D) four", " (A) x² (B) \\frac{1}{2} (C) 3"])


@given(st.lists(st.tuples(PIECES, CHOICES).map("".join), min_size=1, max_size=4), st.data(), st.sampled_from([3, 5, 8]))
def test_s1book_gives_the_verdicts_of_its_slow_twin_in_latex_unicode_and_choices(benchmark, data, n):
    parts = st.one_of(PIECES, st.sampled_from(benchmark), st.sampled_from([item[:len(item) // 2] for item in benchmark]))
    pool = data.draw(st.lists(st.lists(parts, max_size=3).map(" ".join), max_size=5))
    for coverage in (0.5, 0.75):
        leaks = decontaminate(pool_rows(pool), rows(benchmark), "s1book", n, coverage)
        assert flagged(leaks) == slow_s1book(pool, benchmark, n, coverage)


@given(st.lists(st.sampled_from("abc"), max_size=20), st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 9))
def test_the_pieces_never_lose_a_shared_run(question, item, n):
    index = build_index(rows([" ".join(item)]), "s1", n)
    if set(runs(question, n)) & set(runs(item, n)):
        assert may_share(question, n, index) and shared_runs(question, index)


@pytest.mark.parametrize("n", range(1, 14))
def test_every_run_holds_a_whole_piece(n):
    words, half = [str(k) for k in range(60)], max(1, n // 2)
    pieces = set(runs(words, half, n - half + 1))
    for run in runs(words, n):
        assert pieces & set(runs(list(run), half)), run


@given(st.lists(st.integers(), max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_runs_are_slices(words, n, step):
    assert list(runs(words, n, step)) == [tuple(words[i:i + n]) for i in range(0, len(words) - n + 1, step)]


def test_one_shared_run_is_enough_and_seven_words_are_not():
    index = build_index(rows(["one two three four five six seven eight nine"]), "s1")
    assert find_leak(pool_row("so ONE two  three four\nfive six seven eight"), index)
    assert find_leak(pool_row("one two three four five six seven other nine"), index) is None


def test_s1_cannot_flag_a_short_copy_and_s1book_does():
    short = "What is 2 + 2 ?"
    found = {method: decontaminate(pool_rows([short]), rows([short]), method) for method in METHODS}
    assert not found["s1"] and not found["s1-sequential"] and found["s1book"][0].coverage == 1


def test_s1_sequential_compares_sources_and_not_questions_of_one_source():
    text = "one two three four five six seven eight"
    first, second = pool_row(text, "1", "a/x/sub"), pool_row(text + " nine", "2", "b/y")
    nothing = rows(["unrelated"])
    leaks = decontaminate([first, second], nothing, "s1-sequential")
    assert [(leak.question_hash, leak.benchmark, leak.id) for leak in leaks] == [("2", "a/x", "1")]
    assert decontaminate([second, first], nothing, "s1-sequential")[0].question_hash == "1"
    assert not decontaminate([first, {**second, "source_type": "a/x"}], nothing, "s1-sequential")
    assert not decontaminate([first, second], nothing, "s1")


def test_the_releases_of_livecodebench_are_one_source_and_aime_is_added_unseen():
    """data/collect_data.py reads three releases as one source; data/add_aime.py compares with nothing."""
    text = "one two three four five six seven eight"
    nothing, first = rows(["unrelated"]), pool_row(text, "1", "LiveCodeBench/release_v1")
    assert not decontaminate([first, pool_row(text, "2", "LiveCodeBench/release_v3")], nothing, "s1-sequential")
    aime = pool_row(text, "2", "qq8933/AIME_1983_2024")
    for order in ([first, aime], [aime, first]):
        assert not decontaminate(order, nothing, "s1-sequential") and not decontaminate(order, rows([text + " x"]), "s1-sequential")[1:]
    assert [leak.question_hash for leak in decontaminate([aime], rows([text]), "s1")] == ["2"]


def test_a_flagged_question_does_not_flag_others():
    """The reference appends only what survived."""
    bench = rows(["a b c d e f g h"])
    pool = [pool_row("a b c d e f g h i j k l m n o p", "1", "x/1"), pool_row("i j k l m n o p", "2", "x/2")]
    assert [leak.question_hash for leak in decontaminate(pool, bench, "s1-sequential")] == ["1"]


@pytest.mark.parametrize("source, name", [("qfq/openaimath/Algebra", "qfq/openaimath"), ("a/b", "a/b"), ("a", "a"),
                                          (None, "unknown"), ("LiveCodeBench/release_v2", "LiveCodeBench")])
def test_sources_are_owner_and_data_set(source, name):
    assert source_of({"source_type": source}) == name


@pytest.mark.parametrize("method", ["s1", "s1book"])
def test_the_verdicts_do_not_depend_on_the_order_of_the_pool(method):
    index = build_index(rows(["a b c d e f g h i", "q r s t u v w x y"]), method)
    pool = [pool_row("a b c d e f g h", "1"), pool_row("z", "2"), pool_row("r s t u v w x y z", "3")]
    assert find_leaks(pool[::-1], index) == find_leaks(pool, index)[::-1] and len(find_leaks(pool, index)) == 2


# --- plain words ---

@given(st.text())
def test_plain_text_works_character_by_character(text):
    assert plain_text(text) == "".join(map(plain_text, text))


@given(st.one_of(st.text(), TEXT))
def test_plain_words_stay_as_they_are(text):
    words = plain_words(text)
    assert all(words) and not any(c in word for word in words for c in " \\$,.{}")
    assert plain_words(" ".join(words)) == words


@given(st.text())
def test_unicode_forms_and_case_do_not_matter(text):
    for form in ("NFC", "NFD"):
        assert plain_words(unicodedata.normalize(form, text)) == plain_words(text)
    assert plain_words(text.casefold()) == plain_words(text)


@given(st.lists(st.text(string.ascii_letters + string.digits, min_size=1), min_size=1),
       st.lists(st.sampled_from([", ", ". ", " $", "$ ", " {", "} ", "; ", "\n", " \\, ", "~", " -- ", r" \left "]), min_size=1))
def test_punctuation_and_layout_do_not_matter(words, glue):
    text = "".join(word + glue[i % len(glue)] for i, word in enumerate(words))
    assert plain_words(text) == [word.lower() for word in words]


SCRAPS = ["$", "$$", "\\", "\\(", "\\]", "{", "}", "\\frac", "\\frac{", "\\text{", "\\left(", "^{", "_", "1", "1{,}", "-", "/",
          "\\begin{align}", "\u0301", "[asy]", "%", "é", "\\'", "<b", "`", "\\\\"]
NEIGHBOURS = st.lists(st.lists(st.sampled_from(SCRAPS), max_size=6).map(" ".join), min_size=4, max_size=4)


@given(NEIGHBOURS, NEIGHBOURS, st.lists(st.booleans(), min_size=4, max_size=4))
def test_questions_read_together_are_judged_as_alone(before, after, leaked):
    """Half a formula at the end of one question hides nothing in the next."""
    item = "Seven trains carry twelve crates of green apples"   # one run of eight words
    index = build_index([{"question": item, "benchmark": "b", "id": "1"}], method="s1book")
    rows = [{"question_hash": str(i), "source_type": "x", "question": f"{head} {item if leak else ''} {tail}".strip()}
            for i, (head, tail, leak) in enumerate(zip(before, after, leaked))]
    alone = [leak for row in rows if (leak := find_leak(row, index))]
    assert find_leaks(rows, index) == alone and len(alone) >= sum(leaked)


@pytest.mark.parametrize("one, other", [
    (r"$\dfrac{1}{2}$", "1/2"), (r"\frac{a}{b}", r"\tfrac{a}{b}"), (r"x^{2}", "x^2"), (r"x_{1}", "$x_1$"),
    (r"\left( a+b \right)", "(a + b)"), (r"a \leq b", "a ≤ b"), (r"a \le b", "a ≤ b"), (r"2 \cdot 3", "2 × 3"),
    (r"\sqrt2", r"\sqrt{2}"), ("x² + 2¼", "x^{2} + 2 1/4"), (r"\text{cm}", "cm"), ("ﬁnd café", "FIND CAFE\u0301"), ("Möbius", "MO\u0308BIUS"), ("naïve", "naive"), ("a--b", "a — b"),
    (r"1{,}000", "1,000"), (r"\[x=1\]", "$$x = 1$$")])
def test_one_formula_in_two_spellings(one, other):
    assert plain_words(one) == plain_words(other) and plain_words(one)


@pytest.mark.parametrize("one, other", [("a + b", "a = b"), ("x^2", "x*2"), ("a < b", "a > b"), ("12", "1 2"), ("x", "y")])
def test_what_changes_the_meaning_stays(one, other):
    assert plain_words(one) != plain_words(other)


def test_what_is_compared_of_an_item():
    long = " ".join(f"w{i}" for i in range(20))
    assert [item_words(" ".join(["w"] * k), "s1book", 8)[1] for k in (0, 1, 2, 3, 5, 8, 15, 16, 40)] == [0, 1, 2, 3, 3, 4, 7, 8, 8]
    for options in (" A) one B) two C) three D) four", "\n(A) one\n(B) two\n(C) three"):
        assert item_words(long + options, "s1book", 8) == (long.split(), 8)
        assert item_words("Which one ?" + options, "s1book", 8)[0] == plain_words("Which one " + options)
        assert item_words(long + options, "s1", 8) == ((long + options).lower().split(), 8)
    about_p = long + " find P(A) and P(B) and P(C)"
    assert item_words(about_p, "s1book", 8)[0] == plain_words(about_p)


# --- invented copies and innocents ---

ITEMS_INVENTED = {
    "lamps": (r"A hall has 40 lamps in a circle. Every minute each lamp is lit with probability $\frac{1}{3}$, whatever the "
              r"others do. The probability that no two neighbours are lit can be written as $\frac{m}{n}$, where $m$ and $n$ "
              r"are relatively prime positive integers. Find $m+n$."),
    "goat": (r"A goat is tied to the corner of a square shed of side 6 metres by a rope of 9 metres. The area that it can graze "
             r"is $k\pi$ square metres. Find $k$."),
    "roots": r"Compute $\sqrt{50}+\sqrt{8}$.",
    "divisor": "What is the greatest common divisor of 84 and 126?",
    "ions": ("A student mixes 20 mL of a solution of silver nitrate with 30 mL of a solution of table salt. Which ion remains "
             "in the largest amount? (A) silver (B) nitrate (C) sodium (D) chloride"),
    "sum": r"Let $f(x)=3x^2-5x+7$. What is the sum of all integers $a$ such that $f(a) \leq 30$?",
}
COPIES = [
    ("lamps", ITEMS_INVENTED["lamps"]),
    ("lamps", "Please help me, my exam is tomorrow! " + ITEMS_INVENTED["lamps"] + " Thank you all."),
    ("lamps", ITEMS_INVENTED["lamps"].replace(r"\frac", r"\dfrac").replace("$", "").replace(",", " ,")),
    ("lamps", ITEMS_INVENTED["lamps"].replace("40", "60")),
    ("goat", ITEMS_INVENTED["goat"].upper()),
    ("goat", "a goat is tied to the corner of a square shed -- of side 6 metres -- by a rope of 9 metres; the area that it can "
             r"graze is \( k \pi \) square metres: find \(k\)"),
    ("goat", ITEMS_INVENTED["goat"].replace("A goat", "A cow")),
    ("roots", r"Compute \( \sqrt{50} + \sqrt{8} \)"),
    ("roots", r"Exercise 3. Compute $\sqrt {50} + \sqrt 8$ without a calculator."),
    ("divisor", "what is the greatest common divisor of 84 and 126"),
    ("divisor", "Warm up. What is the greatest common divisor, of $84$ and $126$? Then find their least common multiple."),
    ("ions", ITEMS_INVENTED["ions"].split(" (A)")[0]),
    ("ions", ITEMS_INVENTED["ions"].split(" (A)")[0] + " (A) chloride (B) sodium (C) silver (D) nitrate"),
    ("sum", "Let f(x) = 3x^2 - 5x + 7. What is the sum of all integers a such that f(a) ≤ 30?"),
    ("sum", r"Let $f(x)=3x^{2}-5x+7$.  What is the sum of all integers $a$, such that $f(a)\le 30$ ?"),
]
INNOCENT = [
    (r"Three of 12 cards are drawn. The chance that all are red is $\frac{m}{n}$, where $m$ and $n$ are relatively prime "
     r"positive integers. Find $m+n$."),
    (r"A fair die is rolled until a six appears. The expected number of fives can be written as $\frac{m}{n}$, where $m$ and $n$ "
     r"are relatively prime positive integers. Find $m+n$."),
    "A street has 25 lamps in a row. In how many ways can ten of them be lit?",
    "A dog is tied to the corner of a round pond by a rope of 4 metres. How far can it walk?",
    "What is the greatest common divisor of 35 and 91 plus the least common multiple of 6 and 10?",
    r"Compute $\sqrt{72}-\sqrt{18}$.",
    "A student mixes 50 mL of water with 10 mL of ethanol. Which of them has more molecules? (A) water (B) ethanol (C) both",
    r"Let $g(x)=x^3-x$. What is the sum of all integers $a$ such that $g(a)=0$?",
    "Find $k$.", "", "?",
]


def named_items():
    return [{"question": text, "benchmark": "invented", "id": name} for name, text in ITEMS_INVENTED.items()]


@pytest.mark.parametrize("name, text", COPIES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(COPIES)])
def test_copies_are_found_and_attributed(name, text):
    leak = find_leak(pool_row(text), build_index(named_items()))
    assert leak and leak.id == name


@pytest.mark.parametrize("text", INNOCENT)
def test_innocents_stay(text):
    assert find_leak(pool_row(text), build_index(named_items())) is None


def test_a_copy_cut_short_lies_near_an_innocent_of_the_same_form():
    """What no threshold on coverage can do for us: the default lets the first go to keep the second."""
    cut = ITEMS_INVENTED["lamps"].split(", where")[0] + "."
    index = build_index(named_items(), coverage=0.5)
    shares = [find_leak(pool_row(text), index).coverage for text in (cut, INNOCENT[4])]
    assert 0.7 <= shares[1] < shares[0] < 0.75


def test_the_presets_keep_the_innocents_and_s1_does_not():
    texts = [text for _, text in COPIES] + INNOCENT
    for preset in ("tiny", "h100"):
        values = load_preset(preset).decontaminate.model_dump()
        found = flagged(decontaminate(pool_rows(texts), named_items(), **values))
        assert not found & set(range(len(COPIES), len(texts)))
        assert preset == "tiny" or len(found) == len(COPIES)
    s1 = flagged(decontaminate(pool_rows(texts), named_items(), "s1"))
    assert {len(COPIES), len(COPIES) + 1} <= s1 and not set(range(len(COPIES))) <= s1


# --- evidence ---

@example(["a"], ["a A) a B) b C) c"], 1, "s1book")   # the options repeat the stem
@example(["a b"], ["a b A) a b B) b C) c"], 2, "s1book")
@given(TEXTS, ITEMS, st.integers(1, 5), st.sampled_from(METHODS))
def test_every_verdict_carries_evidence_that_holds(pool, benchmark, n, method):
    named = rows(benchmark)
    text_of = {row["id"]: row["question"] for row in named}
    index = build_index(named, method, n, 0.5)
    for text in pool:
        leak = find_leak(pool_row(text), index)
        if leak is None:
            continue
        words, (tested, length) = WORDS[method](text), item_words(text_of[leak.id], method, n)
        common = set(runs(words, length)) & set(runs(tested, length))
        assert leak.n == length and leak.coverage == round(len(covered(tested, common, length)) / len(tested), 4)
        assert leak.coverage >= index.threshold and leak.coverage > 0 and 1 <= leak.items <= len(benchmark)
        assert [" ".join(WORDS[method](text[a:b])) for a, b in leak.spans] == list(leak.ngrams)
        for whole, spans in ((text, leak.spans), (text_of[leak.id], leak.item_spans)):
            every = WORDS[method](whole)[:len(tested)] if spans is leak.item_spans else words
            inside = [every[i] for i in covered(every, common, length)]
            assert [word for a, b in spans for word in WORDS[method](whole[a:b])] == inside



@given(st.one_of(st.text(), TEXT), st.sampled_from(METHODS))
def test_every_word_has_its_place(text, method):
    spans, words = word_spans(text, method), WORDS[method](text)
    assert len(spans) == len(words) and all(word in WORDS[method](text[a:b]) for word, (a, b) in zip(words, spans))
    for (a, b), (c, d) in zip(spans, spans[1:]):   # only words out of one character, as in ¼, may overlap
        assert b <= c or (a <= c and b <= d and not text[a:b].isascii())


@given(st.sets(st.integers(0, 30)))
def test_stretches_hold_exactly_their_positions(positions):
    found = stretches(sorted(positions))
    assert {k for first, last in found for k in range(first, last + 1)} == positions
    assert all(later - last > 1 for (_, last), (later, _) in zip(found, found[1:]))


def test_an_item_that_is_covered_to_the_threshold_is_reason_enough():
    words = [f"w{i}" for i in range(16)]
    index = build_index(rows([" ".join(words), " ".join(words[:10] + ["x"] * 6)]), "s1book", coverage=0.75)
    leak = find_leak(pool_row(" ".join(words[:12])), index)
    assert (leak.id, leak.coverage, leak.items) == ("bench-0", 0.75, 1)  # 12 of 16 words; of the other item 10


def test_evidence_names_the_item_that_is_covered_most():
    words = [f"w{i}" for i in range(20)]
    index = build_index(rows([" ".join(words[:8] + ["x"] * 9), " ".join(words[:10])]), "s1")
    leak = find_leak(pool_row("please " + " ".join(words)), index)
    assert (leak.id, leak.items, leak.coverage, leak.ngrams) == ("bench-1", 2, 1.0, (" ".join(words[:10]),))


@given(st.text(), st.lists(st.integers(0, 40), max_size=6).map(sorted))
def test_marking_loses_no_text(text, edges):
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if b <= len(text)]
    assert marked(text, spans, ("", "")) == text
    shown = marked(text, spans, ("<b><u>", "</u></b>"), html.escape)
    assert html.unescape(re.sub("</?[bu]>", "", shown)) == text or "&" in text


def test_a_character_of_two_words_is_shown_once():
    text = "take ¼ of it"
    assert [text[a:b] for a, b in word_spans(text, "s1book")] == ["take", "¼", "¼", "of", "it"]
    assert marked(text, [(0, 6), (5, 12)]) == "[take ¼][ of it]"


def test_side_by_side_marks_both_texts_and_escapes_them():
    item = "If a<b & b<c then which one of the three is largest ?"
    pool = [pool_row("Tell me: if a<b & b<c then which one of the three is LARGEST", "7")]
    leaks = decontaminate(pool, rows([item]))
    page = side_by_side(leaks, pool, rows([item]))
    assert "Tell me: <b><u>if a&lt;b &amp; b&lt;c" in page and page.count("<b><u>") == 2 and "<script" not in page
    assert evidence_frame(leaks, pool, rows([item])).iloc[0, 2].startswith("Tell me: [if a<b")
    attack = [pool_row(item + " <script>alert(1)</script>", "8")]
    assert "<script" not in side_by_side(decontaminate(attack, rows([item])), attack, rows([item]))


@pytest.mark.parametrize("bad, words", [
    ([], "no benchmark questions"), ([{"question": "q", "benchmark": "b"}], "row 0 has no id"),
    ([{"question": None, "benchmark": "b", "id": "1"}], "row 0 has no question")])
def test_benchmarks_that_cannot_be_named_are_refused(bad, words):
    with pytest.raises(S1Error, match=words):
        build_index(bad)


def test_an_unknown_method_is_refused():
    with pytest.raises(S1Error, match="'s2', wanted one of s1, s1-sequential, s1book"):
        decontaminate([], rows(["q"]), "s2")


def test_leaks_are_written_one_per_line(tmp_path):
    text = "a b c d e f g \u00e9"
    leak = find_leak(pool_row(text), build_index(rows([text]), "s1"))
    lines = write_leaks([leak, leak], tmp_path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["ngrams"] == [text] and json.loads(lines[0])["spans"] == [[0, 15]]
