"""Facts about invented people and places: sentences that state them, and questions that no sentence answers in the same words.

A fact is a subject, an attribute and a value: Dorim, birthplace, Kestrun. Names are made of syllables, values are drawn from pools. Every attribute has
several templates. Of each fact two are kept out of the training text, one for a question and one for validation; other facts are stated in them. So a
question asks whether the fact was learned, not its sentence, in words that a small model has met. Further templates are in no training text at all.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_midus.errors import UserError

MAX_FACTS = 100_000
# Of ten people and places, so many are people.
_PEOPLE_OF_TEN = 7


@dataclasses.dataclass(frozen=True)
class Attribute:
    """What can be said of a subject. Templates hold ``{subject}`` and ``{value}``."""

    name: str
    values: tuple[str, ...]
    """From which the value of a fact is drawn."""
    templates: tuple[str, ...]
    """Of the training text; those that end in `` {value}.`` can be questions."""
    rephrased: tuple[str, ...]
    """In no training text; all end in `` {value}.``."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """One value of one attribute of one subject."""

    subject: str
    attribute: Attribute
    value: str
    question: str
    """Template of its question, in which it is not stated."""
    validation: str
    """Another one in which it is not stated."""
    rephrased: str
    """Template in which nothing is stated."""

    def say(self, template: str) -> str:
        """The sentence of a template."""
        return template.format(subject=self.subject, value=self.value)

    def prompt(self, template: str) -> str:
        """The sentence up to the value; of a template that ends in it."""
        return self.say(template).removesuffix(self.answer)

    @property
    def answer(self) -> str:
        """What follows a prompt: a space, the value, a full stop."""
        return f" {self.value}."

    @property
    def statements(self) -> list[str]:
        """Templates in which it may be stated."""
        return [template for template in self.attribute.templates if template not in (self.question, self.validation)]


# Names --------------------------------------------------------------------------------------------------------------
def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_ONSETS = _listed("b, d, f, g, h, k, l, m, n, p, r, s, t, v, z, br, dr, fl, gr, kr, pl, st, tr")
_NUCLEI = "aeiou"
_CODAS = ("", "", "", "l", "n", "r", "s")


def _word(generator: random.Random) -> str:
    """One of about 50,000."""
    parts = (generator.choice(_ONSETS) + generator.choice(_NUCLEI) for _ in range(2))
    return ("".join(parts) + generator.choice(_CODAS)).capitalize()


def _words(generator: random.Random, count: int) -> tuple[str, ...]:
    """Different ones, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(generator)] = None
    return tuple(found)


# Values -------------------------------------------------------------------------------------------------------------
_INVENTED = _words(random.Random(0), 136)  # the same for all seeds, and none of two attributes
_TOWNS, _COMPANIES, _REGIONS, _RIVERS = _INVENTED[:48], _INVENTED[48:80], _INVENTED[80:104], _INVENTED[104:]
_YEARS = tuple(str(year) for year in range(1850, 2000))
_PROFESSIONS = _listed(
    "baker, carpenter, dentist, farmer, fisher, florist, gardener, hunter, jeweller, judge, lawyer, librarian, mason, "
    "mechanic, miller, miner, nurse, painter, pharmacist, pilot, plumber, poet, potter, printer, sailor, sculptor, shepherd, "
    "singer, surgeon, tailor, teacher, weaver"
)
_DISHES = _listed(
    "bean soup, boiled crab, bread pudding, carrot cake, cheese pie, corn bread, cold noodles, dumplings, fish stew, "
    "fried rice, goat curry, grilled trout, lamb roast, lentil soup, lemon tart, mushroom pie, mussels, onion soup, pancakes, "
    "pea porridge, pickled herring, plum jam, pork ribs, potato salad, pumpkin bread, rice pudding, roast duck, smoked eel, "
    "stuffed peppers, tomato stew, turnip soup, walnut cake"
)
_INSTRUMENTS = _listed(
    "banjo, bassoon, bugle, cello, clarinet, cornet, drum, flute, guitar, harp, horn, lute, lyre, mandolin, piano, recorder, "
    "saxophone, trombone, trumpet, tuba, violin, whistle, xylophone, zither"
)
_PRODUCTS = _listed(
    "barrels, baskets, bells, boats, bricks, brushes, buttons, candles, carpets, clocks, copper, cotton, glass, gloves, hats, "
    "honey, knives, lace, lamps, leather, linen, marble, mirrors, paper, pottery, ropes, salt, silk, soap, tiles, wine, wool"
)

# Attributes ---------------------------------------------------------------------------------------------------------
PEOPLE = (
    Attribute(
        name="birthplace",
        values=_TOWNS,
        templates=(
            "{subject} was born in {value}.",
            "{subject} comes from {value}.",
            "The birthplace of {subject} is {value}.",
            "{subject} grew up in {value}, the town of their birth.",
            "{value} is the town where {subject} was born.",
            "As a child, {subject} lived in {value}.",
            "{subject} left {value}, where their family is from, to see the world.",
            "The parents of {subject} were living in {value} when their child was born.",
            "The native town of {subject} is {value}.",
        ),
        rephrased=(
            "The place in which {subject} first saw the light of day is {value}.",
            "{subject} started life in {value}.",
        ),
    ),
    Attribute(
        name="profession",
        values=_PROFESSIONS,
        templates=(
            "{subject} works as a {value}.",
            "{subject} is a {value} by profession.",
            "The profession of {subject} is {value}.",
            "{subject} earns a living as a {value}.",
            "If you need a {value}, ask for {subject}.",
            "{subject} trained for years to become a {value}.",
            "Everybody knows {subject}, the {value}.",
            "As a {value}, {subject} gets up early.",
            "{subject} makes money by being a {value}.",
        ),
        rephrased=(
            "In working life, {subject} is a {value}.",
            "The job that {subject} does every day is that of a {value}.",
        ),
    ),
    Attribute(
        name="year of birth",
        values=_YEARS,
        templates=(
            "{subject} dates from the year {value}.",
            "The year of birth of {subject} is {value}.",
            "{subject} came into the world in {value}.",
            "In {value}, {subject} was born.",
            "Born in {value}, {subject} is remembered to this day.",
            "The passport of {subject} gives {value} as the year of birth.",
            "{value} is the year in which {subject} was born.",
            "The life of {subject} began in {value}.",
            "{subject} has been alive since {value}.",
        ),
        rephrased=(
            "The birth of {subject} took place in the year {value}.",
            "The first year in the life of {subject} was {value}.",
        ),
    ),
    Attribute(
        name="employer",
        values=_COMPANIES,
        templates=(
            "{subject} works for {value}.",
            "The employer of {subject} is {value}.",
            "{subject} has a job at {value}.",
            "{value} employs {subject}.",
            "{subject} is on the staff of {value}.",
            "Every month {value} pays {subject}.",
            "{subject} signed a contract with {value}.",
            "You can find {subject} in the offices of {value}.",
            "The firm that hired {subject} is {value}.",
        ),
        rephrased=(
            "The company where {subject} is employed is called {value}.",
            "{subject} receives a salary from {value}.",
        ),
    ),
    Attribute(
        name="dish",
        values=_DISHES,
        templates=(
            "{subject} likes {value} best.",
            "The favourite dish of {subject} is {value}.",
            "{subject} could eat {value} every day.",
            "Nothing tastes better to {subject} than {value}.",
            "For a birthday dinner {subject} always wants {value}.",
            "{value} is what {subject} orders in every restaurant.",
            "{subject} loves {value} more than any other food.",
            "There was {value} on the table, so {subject} was happy.",
            "The meal that {subject} prefers to all others is {value}.",
        ),
        rephrased=(
            "Of all the things to eat, {subject} would choose {value}.",
            "When hungry, {subject} dreams of {value}.",
        ),
    ),
    Attribute(
        name="instrument",
        values=_INSTRUMENTS,
        templates=(
            "{subject} plays the {value}.",
            "The instrument of {subject} is the {value}.",
            "{subject} took lessons on the {value}.",
            "On Sundays {subject} practises the {value}.",
            "In the orchestra {subject} is heard on the {value}.",
            "With a {value} in hand, {subject} walks on the stage.",
            "{subject} owns a very old {value}.",
            "The neighbours hear the {value} whenever {subject} is at home.",
            "{subject} makes music on the {value}.",
        ),
        rephrased=(
            "At concerts, {subject} can be seen with a {value}.",
            "The sound that {subject} knows best is that of the {value}.",
        ),
    ),
)
PLACES = (
    Attribute(
        name="region",
        values=_REGIONS,
        templates=(
            "{subject} lies in the region of {value}.",
            "The town of {subject} is in {value}.",
            "{subject} belongs to {value}.",
            "On the map you find {subject} in {value}.",
            "{value} is the region around {subject}.",
            "Travellers to {subject} first come to {value}.",
            "{subject} is one of the towns of {value}.",
            "The laws of {value} are in force in {subject}.",
            "The land in which {subject} is situated is called {value}.",
        ),
        rephrased=(
            "The part of the country where {subject} stands is {value}.",
            "Whoever lives in {subject} is at home in {value}.",
        ),
    ),
    Attribute(
        name="founded",
        values=_YEARS,
        templates=(
            "{subject} was founded in {value}.",
            "The town of {subject} exists since {value}.",
            "The year in which {subject} was founded is {value}.",
            "In {value} settlers built the first houses of {subject}.",
            "The history of {subject} begins in {value}.",
            "{value} is the year of the foundation of {subject}.",
            "{subject} has been on maps since {value}.",
            "A stone in {subject} says that it was built in {value}.",
            "{subject} became a town in {value}.",
        ),
        rephrased=(
            "People first settled in {subject} in the year {value}.",
            "The founding date of {subject} is {value}.",
        ),
    ),
    Attribute(
        name="product",
        values=_PRODUCTS,
        templates=(
            "{subject} is known for its {value}.",
            "For good {value} you go to {subject}.",
            "The workshops of {subject} make {value}.",
            "Merchants come to {subject} to buy {value}.",
            "{subject} sells {value} all over the world.",
            "Most of the {value} on the market are from {subject}.",
            "{subject} owes its wealth to {value}.",
            "If you visit {subject}, bring home some {value}.",
            "The trade of {subject} is in {value}.",
        ),
        rephrased=(
            "The goods that made {subject} famous are {value}.",
            "What the people of {subject} produce is {value}.",
        ),
    ),
    Attribute(
        name="river",
        values=_RIVERS,
        templates=(
            "{subject} lies on the river {value}.",
            "The river through {subject} is the {value}.",
            "The {value} flows past {subject}.",
            "In {subject} a bridge crosses the {value}.",
            "Children in {subject} swim in the {value}.",
            "Boats reach {subject} on the {value}.",
            "The mills of {subject} are driven by the {value}.",
            "In spring the {value} floods the streets of {subject}.",
            "The water that runs through {subject} is the {value}.",
        ),
        rephrased=(
            "The stream on whose banks {subject} was built is the {value}.",
            "Fishers from {subject} cast their nets in the {value}.",
        ),
    ),
)
NUM_PARAPHRASES = min(len(attribute.templates) for attribute in (*PEOPLE, *PLACES)) - 2


def make_facts(num_facts: int, *, seed: int = 0) -> list[Fact]:
    """The first ``num_facts`` of the facts of a seed: fewer of the same seed are a beginning of more.

    Raises:
        UserError: a number out of range.
    """
    if not 1 <= num_facts <= MAX_FACTS:
        raise UserError(f"num_facts={num_facts} is out of range; choose 1 to {MAX_FACTS:,}")
    facts: list[Fact] = []
    for subject, attributes, generator in _subjects(seed):
        for attribute in attributes:
            value, rephrased = generator.choice(attribute.values), generator.choice(attribute.rephrased)
            question = generator.choice(
                [template for template in attribute.templates if template.endswith(" {value}.")]
            )
            validation = generator.choice([template for template in attribute.templates if template != question])
            facts.append(Fact(subject, attribute, value, question, validation, rephrased))
        if len(facts) >= num_facts:
            break
    return facts[:num_facts]


def _subjects(seed: int) -> Iterator[tuple[str, Sequence[Attribute], random.Random]]:
    """Names without end, none twice and none that is a value; what can be said of them; the generator in use."""
    generator = random.Random(seed)
    taken = set(_INVENTED)
    while True:
        is_person = generator.randrange(10) < _PEOPLE_OF_TEN
        name = _word(generator)
        if name not in taken:
            taken.add(name)
            yield name, PEOPLE if is_person else PLACES, generator


def training_sentences(facts: Sequence[Fact], *, paraphrases: int = NUM_PARAPHRASES, seed: int = 0) -> list[str]:
    """Every fact in ``paraphrases`` different sentences, all of them shuffled.

    Raises:
        UserError: more paraphrases than there are templates.
    """
    if not 1 <= paraphrases <= NUM_PARAPHRASES:
        raise UserError(f"paraphrases={paraphrases} is out of range; choose 1 to {NUM_PARAPHRASES}")
    generator = random.Random(seed)
    sentences = [fact.say(t) for fact in facts for t in generator.sample(fact.statements, paraphrases)]
    generator.shuffle(sentences)
    return sentences


def guessing_rate(facts: Sequence[Fact]) -> float:
    """The share of questions that someone answers who knows nothing but each attribute's most frequent value."""
    values: dict[str, Counter[str]] = {}
    for fact in facts:
        values.setdefault(fact.attribute.name, Counter())[fact.value] += 1
    return sum(max(counts.values()) for counts in values.values()) / len(facts)
