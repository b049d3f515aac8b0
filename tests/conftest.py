"""Small shared fixtures: a word-level tokenizer with Qwen's chat template and a random Qwen2."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

# A busy machine is no failure, and what is green here is green elsewhere: the same examples for
# everybody. `make search` draws new ones.
settings.register_profile("s1book", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "s1book"))


@pytest.fixture(autouse=True)
def own_folders():
    """A command that a test calls names its run's folder in the environment: no later test may see it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("S1BOOK_")}
    yield
    for name in [name for name in os.environ if name.startswith("S1BOOK_")]:
        del os.environ[name]
    os.environ.update(before)

# The part of Qwen2.5's chat template that matters here: default system prompt, turns, generation.
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "You are Qwen, created by Alibaba Cloud. a helpful assistant. system user assistant think "
    "answer How many r in raspberry : ? Last digit of the sum Wait Answer: Final So In fours pairs "
    "ones 0 1 2 3 4 5 6 7 8 9 A B C D a b e p s y"
).split() + [f"{i}{c}" for i in range(1, 10) for c in "abeprsy"]


def make_tokenizer():
    """Words split at spaces, a newline is a token, markers are special; decoding is exact."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(dict.fromkeys([*SPECIALS, "<unk>", "\n", *WORDS]))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    # Tokens are joined by a space; beside a newline or a marker that space is taken out again.
    glued = [" \n", "\n ", "<|im_start|> ", " <|im_end|>"]
    tok.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
        + [decoders.Replace(text, text.strip(" ")) for text in glued]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = QWEN_TEMPLATE
    return fast


def make_model(vocab_size: int, seed: int = 0):
    """A random Qwen2 with hidden size 32 and one layer: real code paths, milliseconds a step."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The word-level tokenizer; tests must not change it."""
    return make_tokenizer()


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A fresh random Qwen2 for each test (training changes its weights)."""
    return make_model(len(tiny_tokenizer))


@pytest.fixture
def tiny_folder(tiny_tokenizer, tiny_model, tmp_path):
    """The same two as a saved Hugging Face folder."""
    folder = tmp_path / "tiny_model"
    tiny_tokenizer.save_pretrained(folder)
    tiny_model.save_pretrained(folder)
    return folder


def pytest_sessionfinish():
    """End servers that were started for all tests."""
    import sys

    if "engines" in sys.modules:
        sys.modules["engines"].REST.close()
