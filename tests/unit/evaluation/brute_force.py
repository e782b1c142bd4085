"""Zero-shot metrics counted by hand: prompts written out again, one plain forward pass per choice, no lm-eval."""

import json
import math
import re

import torch


def read(data, name):
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def letters(question, choices):
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", choices))
    return f"{question.strip()}\n{listed}Answer:", list("ABCDE"[: len(choices)])


def arc(item):
    choices = item["choices"]
    return f"Question: {item['question']}\nAnswer:", choices["text"], choices["label"].index(item["answerKey"])


def logiqa(item):
    question = f"Passage: {item['context']}\nQuestion: {item['question']}\nChoices:\n"
    question += "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", item["options"]))
    return question + "Answer:", item["options"], "abcd".index(item["label"])


def piqa(item):
    return f"Question: {item['goal']}\nAnswer:", [item["sol1"], item["sol2"]], item["label"]


def commonsense_qa(item):
    prompt, names = letters(f"Question: {item['question']}", item["choices"]["text"])
    return prompt, names, names.index(item["answerKey"])


def boolq(item):
    return f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", ["no", "yes"], item["label"]


def mmlu(item):
    about = f"The following are multiple choice questions (with answers) about {item['subject'].replace('_', ' ')}."
    prompt, names = letters(item["question"], item["choices"])
    return f"{about}\n\n{prompt}", names, item["answer"]


def winogrande(item):
    """The choices are beginnings, and what follows the gap is scored."""
    start, end = item["sentence"].split("_")
    return [start + item["option1"], start + item["option2"]], [end.strip()] * 2, int(item["answer"]) - 1


FORMATS = {
    "arc_easy": arc,
    "arc_challenge": arc,
    "logiqa": logiqa,
    "piqa": piqa,
    "commonsense_qa": commonsense_qa,
    "boolq": boolq,
    "winogrande": winogrande,
}


def log_likelihood(model, encode, prompt, continuation, *, max_length):
    """Nats of ``continuation`` behind ``prompt``, with as much of the end of the prompt as fits."""
    whole = encode(prompt + " " + continuation)
    count = len(whole) - len(encode(prompt))
    window = whole[-(max_length + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([window[:-1]])).logits[0]
    log_probabilities = logits.double().log_softmax(-1)
    return sum(float(log_probabilities[i - 1, window[i]]) for i in range(len(window) - count, len(window)))


def accuracies(model, encode, items, form, *, max_length):
    """(acc, acc_norm): the choice of the highest likelihood, as it is and per character."""
    right = [0, 0]
    for item in items:
        prompts, choices, answer = form(item)
        if isinstance(prompts, str):
            prompts = [prompts] * len(choices)
        scores = [log_likelihood(model, encode, p, c, max_length=max_length) for p, c in zip(prompts, choices)]
        for place, divisors in enumerate(([1] * len(choices), [len(choice) for choice in choices])):
            normalised = [score / divisor for score, divisor in zip(scores, divisors)]
            right[place] += normalised.index(max(normalised)) == answer
    return right[0] / len(items), right[1] / len(items)


def rolling(model, encode, prefix, text, *, max_length):
    """Nats of a text in windows that do not overlap: each reads the token before its first prediction as well."""
    ids = [prefix, *encode(text)]
    total = 0.0
    for start in range(0, len(ids) - 1, max_length):
        window = ids[start : start + max_length + 1]
        if len(window) <= max_length and start:
            # The last, shorter window is filled up from the left with text that is not scored again.
            window = ids[-(max_length + 1) :]
        scored = min(max_length, len(ids) - 1 - start)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
        total += sum(float(log_probabilities[i - 1, window[i]]) for i in range(len(window) - scored, len(window)))
    return total


def word_perplexity(nats, pages):
    """Words are counted in the original pages, which wikitext's detokenizer shortens."""
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    return math.exp(-sum(nats) / words)
