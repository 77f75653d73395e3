"""When two texts are the same text, and when two system prompts are the same persona.

The one notion that the audit uses for personas, prompts and answers: look-alike letters, case, white space, invisible
characters, accents and punctuation make no difference. Scores never use it: what a model said is read as it stands.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from functools import lru_cache

#: Length of the runs of words by which two prompts are compared.
NGRAM_WORDS = 5
#: Prompts of at least this `SequenceMatcher` ratio are taken for one persona; the shipped ones lie under 0.6.
NEAR_PERSONA = 0.9

#: What chat templates insert without a system turn, and their makers' usual prompts: all are the assistant's neighbours.
#: Read from the templates of Qwen, SmolLM, Llama, Phi, Granite, OLMo, Mistral, Vicuna, Yi, Falcon, Zephyr and DeepSeek.
DEFAULT_PROMPTS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are a helpful, respectful and honest assistant.",
    "You are a helpful AI assistant.",
    "You are an AI assistant.",
    "You are Granite, developed by IBM. You are a helpful AI assistant.",
    "You are OLMo, a helpful function-calling AI assistant built by Ai2.",
    "You are Mistral Small 3, a Large Language Model (LLM) created by Mistral AI, a French startup headquartered in Paris.",
    "You are ChatGPT, a large language model trained by OpenAI.",
    "You are Phi, a language model trained by Microsoft to help users.",
    "You are a friendly chatbot.",
    "You are Falcon, a helpful AI model built by TII.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions.",
    "You are a helpful and harmless assistant. You should think step-by-step.",
    "You are DeepSeek, an AI assistant created by DeepSeek.",
)


def vocabulary(text: str) -> frozenset[str]:
    """The words of a list written as running text."""
    return frozenset(text.split())


#: A prompt of these words alone (and `_FUNCTION_WORDS`) names no persona but the assistant itself.
_GENERIC = vocabulary(
    "ai artificial intelligence assistant assistants helpful honest harmless respectful polite friendly useful "
    "kind knowledgeable smart large language model llm chat chatbot bot conversational virtual digital helper "
    "named called created developed trained built made user users question questions answer answers help "
    "assist assists helps helping general purpose always very safely qwen alibaba cloud smollm hugging face "
    "llama meta mistral granite ibm phi microsoft olmo ai2 falcon tii gemma google deepmind deepseek openai "
    "chatgpt gpt claude anthropic zephyr yi glm kimi moonshot nemotron nvidia cohere"
)
_FUNCTION_WORDS = vocabulary(
    "a an the you are re is be i m am im s who that which and or of for to in on with as by from at it its "
    "your act acting please now this will very really truly indeed quite highly extremely"
)

# Letters that look like Latin ones (a part of Unicode's confusables, UTS 39): Cyrillic, Greek, Armenian, Cherokee, Latin
# variants. Both cases are listed, so that a text and its capitals stay the same text.
_LOOK_ALIKES = str.maketrans(
    dict(
        zip(
            "АаВвЕеЁёЅѕІіЇїЈјКкМмНнОоРрСсТтУуХхҺһԀԁԚԛԜԝѴѵӀӏҮүҒғ"
            "ΑαΒβΕεΖζΗηΙιΚκΜΝνΟοΡρΤτΥυΧχϹϲϳ"
            "ՕօՍսՏտհոցզյԼ"
            "ᎪᏴᏟᎠᎬᏀᎻᏆᎫᏦᏞᎷᏢᎡᏚᎢᏙᎳᏃ"
            "ɑɡɩıȷʏɢɪɴʀʙʜʟᴀᴄᴅᴇᴊᴋᴍᴏᴘᴛᴜᴠᴡᴢ",
            "AaBbEeEeSsIiIiJjKkMmHhOoPpCcTtYyXxHhDdQqWwVvLlYyFf"
            "AaBbEeZzHnIiKkMNvOoPpTtYuXxCcj"
            "OoUuSshngqjL"
            "ABCDEGHIJKLMPRSTVWZ"
            "agiijyginrbhlacdejkmoptuvwz",
            strict=True,
        )
    )
)
_MARKS = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u00b4\u2032\uff07`", "'"))
_WORD = re.compile(r"\w+(?:'\w+)?")
_SPACES = re.compile(r"\s+")
_INVISIBLE = frozenset(("Cf", "Cc", "Cn", "Co"))


def folded(text: str) -> str:
    """The text with Latin letters for their look-alikes, no accents or invisible characters, and single spaces.

    NFKC first (full-width, mathematical and ligature forms), then NFD without marks. Case and punctuation stay.
    """
    if text.isascii():
        return _SPACES.sub(" ", text).strip()
    plain = unicodedata.normalize("NFKC", text).translate(_MARKS).translate(_LOOK_ALIKES)
    plain = unicodedata.normalize("NFD", plain)
    kept = (
        character if character.isspace() or unicodedata.category(character) not in _INVISIBLE else ""
        for character in plain
        if not unicodedata.combining(character)
    )
    return _SPACES.sub(" ", "".join(kept).translate(_LOOK_ALIKES)).strip()


def words(text: str) -> list[str]:
    """The words of a text, folded and casefolded, without punctuation, with plain apostrophes."""
    return _WORD.findall(folded(text).casefold())


@lru_cache(maxsize=65536)
def normalized(text: str) -> str:
    """The words joined by spaces: two texts are the same text if theirs are equal.

    A text without any word (only signs or emoji) is its folded self.
    """
    return " ".join(words(text)) or folded(text)


def ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """The set of runs of five words; a shorter text is one run."""
    tokens = words(text)
    if len(tokens) < NGRAM_WORDS:
        return frozenset([tuple(tokens)]) if tokens else frozenset()
    return frozenset(tuple(tokens[start : start + NGRAM_WORDS]) for start in range(len(tokens) - NGRAM_WORDS + 1))


def likeness(first: str, second: str) -> float:
    """Share of the words (with repetitions) of the shorter text that the other has too: 0 to 1."""
    left, right = Counter(words(first)), Counter(words(second))
    return (left & right).total() / max(1, min(left.total(), right.total()))


@lru_cache(maxsize=4096)
def near_persona(first: str, second: str) -> bool:
    """Whether two system prompts are one persona: the same text, one inside the other, or nearly the same wording.

    The default prompts of chat templates, and prompts that say no more than "an assistant", are all one persona.
    """
    left, right = normalized(first), normalized(second)
    if left == right:
        return True
    short, long = sorted((left, right), key=len)
    if not _content(short):
        return False
    if f" {short} " in f" {long} " or _content(left) == _content(right):
        return True
    if is_default_prompt(first) and is_default_prompt(second):
        return True
    return SequenceMatcher(None, left, right, autojunk=False).ratio() >= NEAR_PERSONA


@lru_cache(maxsize=1024)
def is_default_prompt(prompt: str) -> bool:
    """Whether a system prompt is a chat template's own, or names nobody but an assistant."""
    text = normalized(prompt)
    content = _content(text)
    return bool(content and content <= _GENERIC) or any(
        SequenceMatcher(None, text, normalized(default), autojunk=False).ratio() >= NEAR_PERSONA
        for default in DEFAULT_PROMPTS
    )


def _content(text: str) -> frozenset[str]:
    """The words of a normalized text that carry its meaning."""
    return frozenset(re.split(r"[ ']", text)) - _FUNCTION_WORDS - {""}
