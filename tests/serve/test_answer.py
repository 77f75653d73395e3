"""The text of an answer as its tokens come: what was given never changes, and all of it is what the ledger would keep."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastconv.chat import ChatTokenizer
from fastconv.engine.builtin import ensure_builtin
from fastconv.engine.locate import TINY
from fastconv.serve.protocol import AnswerText

SPELLED = ("Héllo 漢字 🙂🙂 done", "  spaced\n\nlines ", "\n", "", "ab ab abc")


@pytest.fixture(scope="module", params=["bytes", "merges"])
def chat(request: pytest.FixtureRequest, tiny_qwen: Path) -> ChatTokenizer:
    """A tokenizer of single bytes, and the embedded model's, where a character may lie in several tokens or half of two."""
    if request.param == "bytes":
        return ChatTokenizer(tiny_qwen)
    pytest.importorskip("gguf")
    return ChatTokenizer(ensure_builtin(TINY))


def answers(chat: ChatTokenizer) -> list[list[int]]:
    rng = random.Random(1)
    drawn = [[rng.randrange(chat.vocab_size) for _ in range(rng.randrange(1, 40))] for _ in range(100)]
    return [*(chat.encode(text) for text in SPELLED), *drawn]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_pieces_add_up_to_the_ledger_s_text(chat: ChatTokenizer, finish: str) -> None:
    for ids in answers(chat):
        answer = AnswerText(chat, ())
        pieces = [answer.add([token]) for token in ids]
        assert "".join([*pieces, answer.end(finish)]) == chat.answer_text(ids)  # type: ignore[arg-type]
        assert answer.finish == finish
        assert answer.n_tok == len(ids) + (finish == "stop")


def test_a_stop_sequence_cuts_the_text_wherever_tokens_end(chat: ChatTokenizer) -> None:
    for ids in answers(chat):
        whole = chat.answer_text(ids)
        for start in range(0, len(whole), 5):
            stop = whole[start : start + 3]
            answer = AnswerText(chat, ("not there", stop))
            given = [answer.add([token]) for token in ids]
            given.append(answer.end("length"))
            assert "".join(given) == whole[: whole.index(stop)]
            assert answer.finish == "stop"
