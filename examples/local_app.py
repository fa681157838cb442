"""mlx-drift inside an app: two conversations in worker threads share one target and one drafter.

The app keeps mlx-lm's `load` and `stream_generate`; the import and `drafter=` are what changes.
All state of a conversation lives in its own generator, so threads need no lock between them.

    python examples/local_app.py
"""

from queue import Queue
from threading import Thread

from mlx_drift import load_demo, stream_generate

QUESTIONS = {
    "left": "What does `shutil.copytree` do?",
    "right": "Show me the source of `shlex.quote`.",
}
DONE = None


def converse(name, question, model, tokenizer, drafter, pieces):
    """Answers one question, handing every piece of text to the app as soon as it is accepted."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    try:
        for response in stream_generate(model, tokenizer, prompt, max_tokens=200, drafter=drafter):
            pieces.put((name, response.text))
        rounds = response.statistics
        print(f"[{name}: {rounds.acceptance_length:.2f} drafts accepted a round]")
    finally:  # whatever happened, the app does not wait for more
        pieces.put((name, DONE))


def main():
    """Runs both conversations at once and prints each answer when it is complete."""
    pieces: Queue = Queue()
    pair = load_demo()
    threads = [
        Thread(target=converse, args=(name, question, *pair, pieces), daemon=True)
        for name, question in QUESTIONS.items()
    ]
    for thread in threads:
        thread.start()

    answers = dict.fromkeys(QUESTIONS, "")
    open_conversations = set(QUESTIONS)
    while open_conversations:
        name, text = pieces.get()
        if text is DONE:
            open_conversations.discard(name)
            print(f"--- {QUESTIONS[name]}\n{answers[name]}\n")
        else:
            answers[name] += text
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
