"""Text as it comes: the pieces add up, and nothing is taken back."""

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from s1book.budget import Force, budget_force, make_force, whole_answer
from s1book.config import load_preset
from s1book.engine import ScriptedEngine, TransformersEngine
from s1book.forcing import byte_of
from s1book.format import load_tokenizer, prompt_ids
from s1book.streaming import Writer, last_pieces

WORD = "How many r in 1r 2a 3s 4p ?"


def byte_tokenizer():
    """A vocabulary of the 256 bytes, so that most characters are cut."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(letters))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


@settings(max_examples=60)
@given(st.lists(st.text("aé漢🙂 \n", max_size=6), min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 40),
       st.booleans(), st.sampled_from(["\n=", "</t>="]))
@example(["a\n", "", ""], 0, 1, True, "\n=")   # the line break that was cut off, and ours
@example(["a", "", ""], 0, 30, True, "</t>=")    # the mark that the model wrote, and ours
def test_pieces_add_up_and_are_never_taken_back(rounds, waits, most, long_mark, opening):
    code = lambda text: list(BYTES(text, add_special_tokens=False).input_ids)
    stop, end, mark = code("#")[0], code("$")[0], tuple(code("</t>"))
    force = Force(stop_ids=frozenset() if long_mark else frozenset({stop}), answer_stops=frozenset({end}),
                  long_ends=(mark,) if long_mark else (), open_answer=tuple(code(opening)),
                  final_answer=tuple(code("Final: ")), newline=tuple(code("\n")), line_ends=frozenset(code("\n")),
                  max_thinking=most, max_answer=9, ignore_end=waits, wait_ids=tuple(code("Wait")))
    close_by = list(mark) if long_mark else [stop]
    parts = [code(r) + close_by for r in rounds]
    prompt = code("?>")

    def script(ids):
        tail = ids[len(prompt):]
        if code("=")[0] in tail:
            answer = code("é42") + [end]
            at = len(tail) - 1 - tail[::-1].index(code("=")[0]) + 1
            said = tail[at:]
            said = said[len(code("Final: ")):] if said[:1] == code("F") else said
            return answer[min(len(said), len(answer) - 1)]
        text = bytes(code_byte(i) for i in tail).split(b"Wait")
        now = parts[min(len(text) - 1, 2)]
        at = len(text[-1])
        return [now[at] if at < len(now) else close_by[0], code("a")[0]]   # the second where no end may come

    code_byte = {code_one(b): b for b in range(256)}.__getitem__

    writer, pieces = Writer(BYTES, force), []
    engine = ScriptedEngine(script)
    watch = lambda tokens: pieces.extend(writer(tokens))
    [result] = engine.run([budget_force(prompt, force)], None, None, watch)
    pieces += last_pieces(writer, result)
    said = {kind: "".join(p.get(kind, "") for p in pieces) for kind in ("reasoning_content", "content")}
    assert said["reasoning_content"] == BYTES.decode(result.trace.ids)
    assert said["content"] == BYTES.decode(whole_answer(force, result))
    ours = "".join(p.get("closing", "") + p.get("content", "") * p.get("forced", False) for p in pieces)
    assert ours == BYTES.decode(result.closing)[0 if most else len(force.open_answer):]   # at 0 the prompt opens it
    assert not any("\ufffd" in p.get("reasoning_content", "") for p in pieces[:-2])


def code_one(byte):
    """The id of a byte."""
    return BYTES.convert_tokens_to_ids({b: c for c, b in byte_of().items()}[byte])


def test_forced_words_are_marked_and_come_before_the_end():
    tokenizer = load_tokenizer("data/reference/sft")
    model = AutoModelForCausalLM.from_pretrained("data/reference/sft").eval()
    engine, force = TransformersEngine(model, 2, len(tokenizer)), make_force(tokenizer, load_preset("tiny").budget)
    force, pieces = replace(force, ignore_end=2), []
    writer = Writer(tokenizer, force)
    [result] = engine.run([budget_force(prompt_ids(tokenizer, WORD), force)], None, None,
                          lambda tokens: pieces.extend(writer(tokens)))
    streamed = len(pieces)
    pieces += last_pieces(writer, result)
    assert streamed > 10 and len(pieces) - streamed <= 2
    assert "".join(p.get("reasoning_content", "") for p in pieces if p.get("forced")).count("Wait") == result.trace.waits == 2
    assert "".join(p.get("content", "") for p in pieces) == tokenizer.decode(whole_answer(force, result))
