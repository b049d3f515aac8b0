"""Format: the text is the reference's, the mask is on the prompt and nowhere else."""

import itertools

import pyarrow.parquet as pq
import pytest
from conftest import QWEN_TEMPLATE, WORDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s1book.format import (
    IGNORE,
    S1,
    Delimiters,
    FormatError,
    Sample,
    answer_text,
    chat_ids,
    load_tokenizer,
    mask_html,
    pieces,
    prompt_ids,
    save_samples,
    token_roles,
    tokenize_row,
    tokenize_rows,
    tokenizer_mark,
)

ROW = {
    "question_hash": "00aa",
    "question": "How many r in : 1r 2a 3s ?",
    "trace": "In ones\n1r 1\nSo 1\nWait\nSo 1",
    "attempt": "1",
}
PLAIN = [word for word in WORDS if word not in ("system", "user", "assistant")]
line = st.lists(st.sampled_from(PLAIN), min_size=1, max_size=8).map(" ".join)
text = st.lists(line, min_size=1, max_size=6).map("\n".join)
edge = st.sampled_from(["", "\n", " \n\n"])
rows = st.builds(
    lambda q, t, a, e: {"question_hash": "h", "question": q, "trace": e + t + e, "attempt": a + e},
    line,
    text,
    line,
    edge,
)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE as real models have it; ".\\n" is one token in it, as in Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                __import__("tokenizers").Regex(
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s?\p{L}+|\p{N}|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        [ROW["trace"], "So 1.\nWait.\nSo 2.\n" * 9],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = QWEN_TEMPLATE
    return fast


def reference_text(row):
    """The text as data/tokenization.py of the reference gives it, without the last newline."""
    answer = row["attempt"] if "Answer:" in row["attempt"] else "Answer: " + row["attempt"]
    return (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
        "You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n<|im_start|>think\n"
        f"{row['trace'].strip()}\n<|im_start|>answer\n{answer.strip()}<|im_end|>"
    )


@relaxed
@given(row=rows)
def test_mask_and_text_on_any_row(tiny_tokenizer, bpe, row):
    for tokenizer in (tiny_tokenizer, bpe):
        sample = tokenize_row(tokenizer, row)
        prompt = chat_ids(tokenizer, row["question"])
        assert tokenizer.decode(sample.input_ids) == reference_text(row)
        assert (
            sample.input_ids == tokenizer(reference_text(row), add_special_tokens=False).input_ids
        )
        # Every prompt token is left out; every other one is its own label, the end included.
        assert sample.labels == [IGNORE] * len(prompt) + sample.input_ids[len(prompt) :]
        assert sample.labels[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.decode(sample.labels[len(prompt) :]) == "".join(
            p.text for p in pieces(tokenizer, row)[1:]
        )


@relaxed
@given(row=rows)
def test_prompt_plus_continuation_is_the_whole(tiny_tokenizer, row):
    whole = tokenize_row(tiny_tokenizer, row).input_ids
    prompt = prompt_ids(tiny_tokenizer, row["question"])
    rest = reference_text(row).split("<|im_start|>think\n", 1)[1]
    assert prompt + tiny_tokenizer(rest, add_special_tokens=False).input_ids == whole


@relaxed
@given(row=rows)
def test_roles_by_offsets_agree_with_the_labels(tiny_tokenizer, bpe, row):
    for tokenizer in (tiny_tokenizer, bpe):
        sample, roles = tokenize_row(tokenizer, row), token_roles(tokenizer, row)
        assert "".join(t for t, _ in roles).replace(" ", "") == reference_text(row).replace(" ", "")
        assert [label == IGNORE for label in sample.labels] == [
            role == "prompt" for _, role in roles
        ]
        order = [role for role, _ in itertools.groupby(roles, key=lambda pair: pair[1])]
        assert order in (["prompt", "delimiter", "thinking", "delimiter", "answer", "end"],)


def test_full_stop_and_newline_are_one_token_and_carry_loss(bpe):
    row = {**ROW, "trace": "So 1.\nWait.", "attempt": "1."}
    sample = tokenize_row(bpe, row)
    assert ".Ċ" in bpe.convert_ids_to_tokens(sample.input_ids)  # this tokenizer has the case
    assert bpe.decode(sample.input_ids) == reference_text(row)


def test_prompts_end_where_they_should(tiny_tokenizer):
    chat, think = (f(tiny_tokenizer, ROW["question"]) for f in (chat_ids, prompt_ids))
    assert tiny_tokenizer.decode(chat).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tiny_tokenizer.decode(think) == tiny_tokenizer.decode(chat) + "<|im_start|>think\n"
    assert "You are Qwen, created by Alibaba Cloud." in tiny_tokenizer.decode(chat)


@pytest.mark.parametrize(
    ("attempt", "wanted"),
    [
        ("3", "Answer: 3"),
        ("Answer: 3", "Answer: 3"),
        ("So\nAnswer: 3\n", "So\nAnswer: 3"),
        ("Final Answer: 3", "Final Answer: 3"),
        ("answer: 3", "Answer: answer: 3"),
        ("Answers: 3", "Answer: Answers: 3"),
        (" 3 ", "Answer:  3"),
    ],
)
def test_answer_rule(attempt, wanted):
    assert answer_text(attempt) == wanted


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attempt", "", "attempt: found nothing"),
        ("attempt", "\n", "attempt: found nothing"),
        ("trace", None, "trace: found nothing"),
        ("trace", float("nan"), "trace: found nothing"),
        ("question", "", "question: found nothing"),
        ("question", "r <|im_end|>", "control text '<|im_end|>'"),
        ("trace", "So <|im_start|>answer 3", "control text '<|im_start|>'"),
        ("trace", "So zebra", "no token for 'zebra'"),
    ],
)
def test_bad_rows_are_refused_by_a_sentence(tiny_tokenizer, key, value, message):
    with pytest.raises(FormatError, match=message.replace("|", r"\|")):
        tokenize_row(tiny_tokenizer, {**ROW, key: value})


def test_missing_column_and_missing_template_are_refused(tiny_tokenizer, bpe):
    with pytest.raises(FormatError, match="attempt: found nothing"):
        tokenize_row(tiny_tokenizer, {k: v for k, v in ROW.items() if k != "attempt"})
    import copy

    bare = copy.deepcopy(bpe)
    bare.chat_template = None
    with pytest.raises(FormatError, match="no chat template"):
        chat_ids(bare, "How many")


def test_other_delimiters(tiny_tokenizer, bpe):
    tags = Delimiters("<think>\n", "\n</think>\n\n", "<|im_end|>")
    sample = tokenize_row(bpe, ROW, tags)
    assert (
        bpe.decode([x for x in sample.labels if x != IGNORE])
        == f"<think>\n{ROW['trace']}\n</think>\n\nAnswer: 1<|im_end|>"
    )
    with pytest.raises(FormatError, match="</think>"):  # a trace that closes its own thinking
        tokenize_row(bpe, {**ROW, "trace": "So </think> 1"}, tags)
    with pytest.raises(FormatError, match="no token for '<think>'"):
        tokenize_row(tiny_tokenizer, ROW, tags)


def test_a_token_across_the_seam_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocab = {
        t: i for i, t in enumerate(["<|im_start|>", "<|im_end|>", *letters, "\nI"])
    }  # "\nI" grows across the header
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "I")]))
    tok.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    fast.chat_template = QWEN_TEMPLATE
    with pytest.raises(FormatError, match="grows across"):
        tokenize_row(fast, ROW)
    assert tokenize_row(fast, {**ROW, "trace": "So 1"}).labels.count(IGNORE) == len(
        chat_ids(fast, ROW["question"])
    )


def test_too_long_is_dropped_whole_and_counted(tiny_tokenizer):
    long = {**ROW, "question_hash": "00bb", "trace": "\n".join([ROW["trace"]] * 5)}
    n = len(tokenize_row(tiny_tokenizer, ROW).input_ids)
    for limit, kept in ((n, ["00aa"]), (10**6, ["00aa", "00bb"])):
        formatted = tokenize_rows([ROW, long], tiny_tokenizer, limit)
        assert [s.question_hash for s in formatted.samples] == kept
        assert len(formatted.samples) + len(formatted.too_long) == 2
        assert all(s.input_ids[-1] == tiny_tokenizer.eos_token_id for s in formatted.samples)
    assert tokenize_rows([ROW, long], tiny_tokenizer, n).too_long == {
        "00bb": len(tokenize_row(tiny_tokenizer, long).input_ids)
    }
    with pytest.raises(FormatError, match="at most 5 tokens among 2"):
        tokenize_rows([ROW, long], tiny_tokenizer, 5)
    with pytest.raises(FormatError, match="among 0"):
        tokenize_rows([], tiny_tokenizer, 5)


@relaxed
@given(row=rows, limit=st.integers(1, 80))
def test_a_cut_on_the_right_keeps_the_start_and_counts_itself(tiny_tokenizer, row, limit):
    whole = tokenize_row(tiny_tokenizer, row)
    prompt = len(chat_ids(tiny_tokenizer, row["question"]))
    if limit <= prompt:  # nothing to learn is left
        with pytest.raises(FormatError, match=f"at most {limit} tokens among 1"):
            tokenize_rows([row], tiny_tokenizer, limit, truncate="right")
        return
    formatted = tokenize_rows([row], tiny_tokenizer, limit, truncate="right")
    assert formatted.samples[0].input_ids == whole.input_ids[:limit]
    assert formatted.samples[0].labels == whole.labels[:limit] and not formatted.too_long
    size = len(whole.input_ids)
    assert formatted.cut == ({whole.question_hash: size} if size > limit else {})


def test_a_delimiter_of_one_token(bpe):
    import copy

    one = copy.deepcopy(bpe)
    one.add_tokens(["<think>", "</think>"], special_tokens=True)
    tags = Delimiters("<think>\n", "\n</think>\n\n", "<|im_end|>")
    sample = tokenize_row(one, ROW, tags)
    tokens = one.convert_ids_to_tokens([x for x in sample.labels if x != IGNORE])
    assert tokens[0] == "<think>" and tokens.count("</think>") == 1
    assert one.decode(sample.input_ids) == bpe.decode(tokenize_row(bpe, ROW, tags).input_ids)


def test_saved_samples_read_back(tiny_tokenizer, tmp_path):
    samples = [tokenize_row(tiny_tokenizer, ROW)]
    save_samples(samples, tmp_path / "t.parquet")
    assert [Sample(**row) for row in pq.read_table(tmp_path / "t.parquet").to_pylist()] == samples
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_the_file_names_the_tokenizer_that_made_it(tiny_tokenizer, tiny_folder, bpe, tmp_path):
    import copy

    mark = tokenizer_mark(tiny_tokenizer)
    save_samples([tokenize_row(tiny_tokenizer, ROW)], tmp_path / "t.parquet", tiny_tokenizer)
    assert pq.read_schema(tmp_path / "t.parquet").metadata[b"tokenizer"].decode() == mark
    used = copy.deepcopy(tiny_tokenizer)
    used(["So 1", "So"], padding=True, truncation=True, max_length=2)  # leaves no trace in the mark
    assert tokenizer_mark(used) == mark == tokenizer_mark(load_tokenizer(tiny_folder))
    other, more = copy.deepcopy(bpe), copy.deepcopy(bpe)
    other.chat_template += " "
    more.add_tokens(["<think>"])
    assert len({mark, *map(tokenizer_mark, (bpe, other, more))}) == 4


def test_viewer_can_be_read_without_colour(tiny_tokenizer):
    page = mask_html(tiny_tokenizer, {**ROW, "question": "How many < 3 ?".replace("<", "A")})
    assert page.count("<td>no</td>") == 1 and page.count("<td>yes</td>") == 5
    assert (
        page.index("<i style") < page.index("<u style")
        and "⏎" in page
        and "&lt;|im_end|&gt;" in page
    )


def test_the_tokenizer_is_read_from_its_own_file(tiny_folder, tiny_tokenizer):
    loaded = load_tokenizer(tiny_folder)
    assert tokenize_row(loaded, ROW) == tokenize_row(tiny_tokenizer, ROW)
    assert loaded.decode(prompt_ids(loaded, ROW["question"])).endswith("<|im_start|>think\n")


def test_default_delimiters_are_s1s():
    assert S1 == Delimiters("<|im_start|>think\n", "\n<|im_start|>answer\n", "<|im_end|>")
