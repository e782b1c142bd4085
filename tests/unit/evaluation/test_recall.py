"""Recall against generate() and against a float64 sum of single steps; a model that has learned its facts recalls them."""

import pytest
import torch
from llama_of_bytes import ByteTokenizer, make_llama

from megatron_midus.data.facts import make_facts
from megatron_midus.evaluation.recall import EncodedQuestion, Question, encode_questions, measure_recall
from megatron_midus.evaluation.zero_shot import TaskResults, with_scores


def recall_of(model, questions, **settings):
    return {score.metric: score for score in measure_recall(model, questions, task="facts", **settings)}


def generated(model, ids, count):
    inputs = torch.tensor([ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


def mixed_questions(model):
    """Half of the answers are what the model says, the others leave it at a token in their middle or at their end."""
    generator = torch.Generator().manual_seed(3)
    questions = []
    for index in range(14):
        prompt = torch.randint(256, (3 + index,), generator=generator).tolist()
        answer = generated(model, prompt, 1 + index % 4)
        if index % 2:
            wrong = -1 if index % 4 == 1 else len(answer) // 2
            answer[wrong] = (answer[wrong] + 1) % 256
        questions.append(EncodedQuestion(prompt + answer, len(prompt)))
    return questions


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_recall_is_what_generate_writes(llama, batch_size):
    questions = mixed_questions(llama)
    same = [generated(llama, q.ids[: q.first], len(q.ids) - q.first) == q.ids[q.first :] for q in questions]
    assert sum(same) == 7
    score = recall_of(llama, questions, batch_size=batch_size)["recall"]
    assert (score.value, score.items, score.higher_is_better) == (0.5, 14, True)
    assert [influence > 0 for influence in score.influences] == same
    assert score.stderr == pytest.approx((0.25 / 13) ** 0.5)


def test_log_likelihood_is_the_sum_over_single_steps(llama):
    """float32 logits of magnitude 10 leave 1e-5."""
    questions, expected = mixed_questions(llama), []
    for question in questions:
        nats = 0.0
        for stop in range(question.first, len(question.ids)):
            with torch.no_grad():
                logits = llama(input_ids=torch.tensor([question.ids[:stop]])).logits[0, -1].double()
            nats += logits.log_softmax(-1)[question.ids[stop]].item()
        expected.append(nats)
    score = recall_of(llama, questions, batch_size=4)["log_likelihood"]
    assert score.value == pytest.approx(sum(expected) / 14, rel=1e-5)


class PairTokenizer(ByteTokenizer):
    """Bytes, but a letter and a full stop behind it, or a space and a letter, are one token."""

    def encode_batch(self, texts):
        def encode(text):
            pairs = {"e ": 200, "b.": 201}
            ids = []
            while text:
                length = 2 if text[:2] in pairs else 1
                ids.append(pairs.get(text[:2], ord(text[0])))
                text = text[length:]
            return ids

        return [encode(text) for text in texts]


def test_a_token_on_both_sides_belongs_to_the_answer():
    (split,) = encode_questions(PairTokenizer(), [Question("the", " ab.")])
    assert split.ids == [257, ord("t"), ord("h"), 200, ord("a"), 201] and split.first == 3
    (plain,) = encode_questions(ByteTokenizer(), [Question("the", " ab.")], add_bos=True)
    assert plain.ids == [256, *b"the ab."] and plain.first == 4
    (empty,) = encode_questions(ByteTokenizer(), [Question("the", "")])
    assert empty.first == 3  # something is left to be predicted


def test_no_questions_no_bos_and_overflow(llama):
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="no question"):
        encode_questions(tokenizer, [])
    tokenizer.bos = None
    with pytest.raises(ValueError, match="no beginning-of-sequence"):
        encode_questions(tokenizer, [Question("a", "b")], add_bos=True)
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        recall_of(model, [EncodedQuestion([1, 2, 3], 2)])


def test_scores_join_those_of_other_tasks(llama):
    scores = measure_recall(llama, mixed_questions(llama), task="facts")
    alone = with_scores(None, scores)
    assert alone.top_level == [("facts", "recall"), ("facts", "log_likelihood")]
    other = with_scores(TaskResults({("piqa", "acc"): scores[0]}, {}, {"piqa": 1}, 2), scores)
    assert len(other.scores) == 3 and other.versions == {"piqa": 1} and other.num_truncated == 2


def test_a_model_that_learned_its_facts_recalls_them():
    """Before and after; it learns the sentences of the questions, as a random model has no words to generalise from."""
    facts, tokenizer = make_facts(4, seed=2), ByteTokenizer()
    questions = encode_questions(tokenizer, [Question(fact.prompt(fact.question), fact.answer) for fact in facts])
    model = make_llama(hidden_size=48, intermediate_size=96, max_position_embeddings=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2 if parameter.dim() > 1 else 1.0)
    assert recall_of(model, questions)["recall"].value == 0
    longest = max(len(question.ids) for question in questions)
    ids = torch.full((4, longest), tokenizer.eod)
    for row, question in enumerate(questions):
        ids[row, : len(question.ids)] = torch.tensor(question.ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = recall_of(model, questions, batch_size=3)
    assert scores["recall"].value == 1 and -0.5 < scores["log_likelihood"].value < 0
