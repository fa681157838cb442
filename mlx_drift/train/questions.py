"""Questions that the target asks itself.

After a template's opening of a user's turn an instruction-tuned model writes one (Magpie: Xu et
al., arXiv 2406.08464).
"""

from mlx_drift.errors import DriftError
from mlx_drift.generate import stream_generate
from mlx_drift.train.answers import Answerer, draw
from mlx_drift.train.conversations import Conversation
from mlx_drift.train.layout import Text
from mlx_drift.train.text_file import TextFile

PLACE = "<query>"
TEMP, TOP_P, MOST_TOKENS = 1.0, 0.95, 192
SOURCE = "self"


def ask_oneself(answerer: Answerer, number: int, file: TextFile) -> Conversation | None:
    """Lets the target write a question.

    Args:
        answerer: The target.
        number: Which of its questions: each has its own seed.
        file: Where it is kept.

    Returns:
        The question; None if it came to no end, or is empty.

    Raises:
        DriftError: If the chat template does not say where a user's turn begins.
    """
    key = f"question {number}"
    texts = file.find(key)
    if texts is None:
        texts = _written(answerer, number)
        file.add(key, texts)
    if not texts:
        return None
    ((start, stop),) = texts[0].said
    question = answerer.tokenizer.decode(texts[0].tokens[start : stop - 1]).strip()
    if not question:
        return None
    return _conversation(number, question)


def _written(answerer: Answerer, number: int) -> list[Text]:
    layout, tokenizer = answerer.layout, answerer.tokenizer
    place = _conversation(number, PLACE)
    wording = layout.wording(place)
    laid_out = wording.lay_out(tokenizer, layout.messages(place), add_generation_prompt=False)
    opening, found, _ = laid_out.partition(PLACE)
    if not found or not opening:
        raise DriftError(
            "the chat template puts nothing before what a user says, so the target cannot be asked "
            "for questions; give some with --data"
        )
    prompt = tokenizer.encode(opening, add_special_tokens=False)
    seed = draw(answerer.asking.seed, f"question {number}")
    tokens = [
        int(response.token)
        for response in stream_generate(
            answerer.model, tokenizer, prompt, MOST_TOKENS, temp=TEMP, top_p=TOP_P, seed=seed
        )
    ]
    ends = bool(tokens) and tokens[-1] in layout.stops
    return [Text([*prompt, *tokens], [(len(prompt), len(prompt) + len(tokens))])] if ends else []


def _conversation(number: int, question: str) -> Conversation:
    return Conversation(str(number), SOURCE, SOURCE, ({"role": "user", "content": question},))
