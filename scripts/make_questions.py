#!/usr/bin/env python3
"""Write `recipes/questions.jsonl`: 200 school questions that we wrote, each with its answer.

    scripts/make_questions.py OUT

One line per question: {"question": ..., "answer": ...}. Forty stories, each five times with other names and
numbers; every call makes the same ones.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = [
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jamila",
    "Kofi",
    "Lena",
    "Marek",
    "Nadia",
    "Omar",
    "Petra",
    "Rosa",
    "Sami",
    "Tara",
    "Yuki",
]
TIMES = 5

# A story with places {n} {m} for names and {a} {b} {c} for numbers, and its answer.
Story = tuple[str, Callable[[int, int, int], int]]
STORIES: tuple[Story, ...] = (
    ("{n} has {a} apples and buys {b} more. How many apples does {n} have now?", lambda a, b, c: a + b),
    (
        "A shelf holds {a} books. There are {b} shelves in the room. How many books are there?",
        lambda a, b, c: a * b,
    ),
    ("{n} reads {a} pages a day for {b} days. How many pages is that?", lambda a, b, c: a * b),
    ("{n} is {a} years old and {m} is {b} years older. How old is {m}?", lambda a, b, c: a + b),
    (
        (
            "A bus has {a} passengers. At the next stop {b} more get on and {c} get off. How many are on the "
            "bus?"
        ),
        lambda a, b, c: a + b - c,
    ),
    (
        "{n} bakes {a} trays of {b} cookies and eats {c} of them. How many cookies are left?",
        lambda a, b, c: a * b - c,
    ),
    ("A ticket costs {a} dollars. How much do {b} tickets cost?", lambda a, b, c: a * b),
    (
        "{n} saves {a} dollars every week. How many dollars does {n} have after {b} weeks?",
        lambda a, b, c: a * b,
    ),
    (
        "There are {a} red, {b} blue and {c} green marbles in a bag. How many marbles are in the bag?",
        lambda a, b, c: a + b + c,
    ),
    (
        "{n} walks {a} kilometres in the morning and {b} in the evening. How far does {n} walk in a day?",
        lambda a, b, c: a + b,
    ),
    (
        "A farmer has {a} hens. Each hen lays {b} eggs a week. How many eggs is that in a week?",
        lambda a, b, c: a * b,
    ),
    ("A train goes {a} kilometres in one hour. How far does it go in {b} hours?", lambda a, b, c: a * b),
    (
        "{n} buys {a} pens for {b} dollars each and a notebook for {c} dollars. What does {n} pay?",
        lambda a, b, c: a * b + c,
    ),
    (
        "A class has {a} girls and {b} boys. Today {c} children are ill. How many came to school?",
        lambda a, b, c: a + b - c,
    ),
    (
        (
            "A tank holds {a} litres of water. {n} adds {b} buckets of {c} litres. How many litres are in "
            "the tank?"
        ),
        lambda a, b, c: a + b * c,
    ),
    ("{n} plants {a} rows of {b} trees. How many trees does {n} plant?", lambda a, b, c: a * b),
    ("A recipe for one cake needs {a} eggs. How many eggs do {b} cakes need?", lambda a, b, c: a * b),
    (
        "{n} has {a} stamps, {m} has {b} more than {n}. How many stamps do they have together?",
        lambda a, b, c: 2 * a + b,
    ),
    (
        "A week has seven days. {n} practises {a} minutes a day. How many minutes is that in a week?",
        lambda a, b, c: 7 * a,
    ),
    (
        "A car uses {a} litres of fuel on a trip. It makes the trip {b} times. How many litres does it use?",
        lambda a, b, c: a * b,
    ),
    (
        "{n} scores {a} points in the first game, {b} in the second and {c} in the third. What is the total?",
        lambda a, b, c: a + b + c,
    ),
    (
        "A garden is {a} metres long and {b} metres wide. What is its area in square metres?",
        lambda a, b, c: a * b,
    ),
    ("A fence has {a} posts on each of its four sides. How many posts are there?", lambda a, b, c: 4 * a),
    ("{n} earns {a} dollars an hour and works {b} hours. How much does {n} earn?", lambda a, b, c: a * b),
    (
        "A box holds {a} chocolates. {n} buys {b} boxes and gives away {c} chocolates. How many are left?",
        lambda a, b, c: a * b - c,
    ),
    ("A hotel has {a} floors with {b} rooms each. How many rooms does it have?", lambda a, b, c: a * b),
    ("{n} types {a} words a minute. How many words does {n} type in {b} minutes?", lambda a, b, c: a * b),
    (
        (
            "There were {a} people at a concert on Friday and {b} on Saturday. How many came on both days "
            "together?"
        ),
        lambda a, b, c: a + b,
    ),
    ("A spider has eight legs. How many legs do {a} spiders have?", lambda a, b, c: 8 * a),
    (
        "{n} has {a} boxes with {b} pencils in each, and {c} loose pencils. How many pencils is that?",
        lambda a, b, c: a * b + c,
    ),
    (
        "A school orders {a} chairs for each of its {b} classrooms. How many chairs does it order?",
        lambda a, b, c: a * b,
    ),
    (
        "{n} pours {a} cups of tea. Then {m} pours {b} cups more than {n}. How many cups did {m} pour?",
        lambda a, b, c: a + b,
    ),
    (
        "A ship carries {a} containers. It unloads {c} and loads {b}. How many does it carry now?",
        lambda a, b, c: a - c + b,
    ),
    (
        "A path goes {a} metres uphill, {b} metres along a wall and {c} metres downhill. How long is it?",
        lambda a, b, c: a + b + c,
    ),
    (
        "{n} folds {a} paper cranes an hour. How many cranes does {n} fold in {b} hours?",
        lambda a, b, c: a * b,
    ),
    (
        "A library lends {a} books on Monday and twice as many on Tuesday. How many on both days?",
        lambda a, b, c: 3 * a,
    ),
    (
        "A band plays {a} songs. Each song takes {b} minutes. How many minutes does the band play?",
        lambda a, b, c: a * b,
    ),
    (
        (
            "{n} collects {a} shells and finds {b} more each day for {c} days. How many shells are there in "
            "the end?"
        ),
        lambda a, b, c: a + b * c,
    ),
    (
        "An orchestra has {a} violins, {b} flutes and {c} horns. How many instruments is that?",
        lambda a, b, c: a + b + c,
    ),
    (
        "A baker sells {a} loaves in the morning and half as many in the afternoon. How many loaves is that?",
        lambda a, b, c: a + a // 2,
    ),
)


def questions() -> Iterator[dict[str, str]]:
    """All questions, shuffled."""
    rng = random.Random(0)
    found = []
    for story, answer in STORIES:
        told: set[str] = set()
        while len(told) < TIMES:
            n, m = rng.sample(NAMES, 2)
            a, b, c = 2 * rng.randint(5, 20), rng.randint(2, 9), rng.randint(2, 9)
            text = story.format(n=n, m=m, a=a, b=b, c=c)
            if text not in told:
                found.append({"question": text, "answer": str(answer(a, b, c))})
            told.add(text)
    rng.shuffle(found)
    yield from found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    lines = [json.dumps(q) + "\n" for q in questions()]
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
