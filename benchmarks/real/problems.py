"""Sentences about people, and the JSON that says the same: the problems of examples/smollm2.

    python -m benchmarks.real.problems FILE.jsonl HELD_OUT.jsonl

No name and no city of a held-out problem occurs in the others. A model that has lost half of its
layers learns twenty names by heart instead of copying them from the sentence, so it is taught
with names and cities that are made up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karen Leo Maria Noah Olga Paul Rosa Sam "
    "Tina Victor Walter Yara Zoe Lucas Nina Oscar Peter Ruth Simon Vera"
)
CITIES = (
    "Paris London Berlin Rome Madrid Vienna Oslo Dublin Lisbon Athens Warsaw Prague Tokyo Cairo "
    "Lima Boston Chicago Toronto Sydney Seoul Delhi Nairobi Geneva Milan Dallas Denver"
)
JOBS = (
    "teacher nurse doctor farmer pilot baker lawyer painter driver cook singer writer engineer "
    "plumber dentist"
)
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, who is {age}, moved to {city} last year.",
    "At {age}, {name} works as a {job} in {city}.",
    "In {city} I met {name}, a {age}-year-old {job}.",
    "My friend {name} from {city} turned {age} yesterday.",
    "The {job} {name} ({age}) comes from {city}.",
    "{city} is the home of {name}, a {job} aged {age}.",
    "Last week {name} left {city} at the age of {age}.",
)
ASKED = "{sentence}\nWrite this as JSON with the keys name, age and city."
TRAINED_NAMES = 20
TRAINED_CITIES = 16
MADE_UP = 1500
"""Names, and as many cities."""
BEGINNINGS = "B Br Ch D F G Gr H K L M N P R S St T Tr V Z"
MIDDLES = "al an ar el en er il in ol on or ul"
ENDINGS = "a da do ek ia io is ka la mo na o ra ro ta us"
TRAINED = 4096
HELD_OUT = 256


def write_problems(trained: Path, held_out: Path) -> None:
    """Write the same two files each time, a problem a line."""
    names, cities = NAMES.split(), CITIES.split()
    rows = _different(TRAINED, names[:TRAINED_NAMES], cities[:TRAINED_CITIES], Random(0))
    _write(trained, rows)
    rows = _different(HELD_OUT, names[TRAINED_NAMES:], cities[TRAINED_CITIES:], Random(1))
    _write(held_out, rows)


def write_varied_problems(trained: Path) -> None:
    """Write as many problems to train on, with many names and cities, the same ones each time."""
    random = Random(2)
    made_up = _made_up(2 * MADE_UP, random)
    rows = _different(TRAINED, made_up[:MADE_UP], made_up[MADE_UP:], random)
    _write(trained, rows)


def _made_up(count: int, random: Random) -> list[str]:
    """`count` different words that read like names, such as Branda; none of them is held out."""
    parts = BEGINNINGS.split(), MIDDLES.split(), ENDINGS.split()
    words = ["".join(chosen) for chosen in product(*parts)]
    known = {*NAMES.split(), *CITIES.split()}
    return random.sample([word for word in words if word not in known], count)


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _different(
    count: int, names: Sequence[str], cities: Sequence[str], random: Random
) -> Iterator[dict[str, Any]]:
    """`count` problems, none of them twice."""
    seen: set[str] = set()
    while len(seen) < count:
        made = problem(random.choice(names), random.randint(18, 80), random.choice(cities), random)
        if made["prompt"] not in seen:
            seen.add(made["prompt"])
            yield made


def problem(name: str, age: int, city: str, random: Random) -> dict[str, Any]:
    """A row for `task.name = "jsonl"`; its answer is a schema that one value alone fits."""
    sentence = random.choice(SENTENCES).format(
        name=name, age=age, city=city, job=random.choice(JOBS.split())
    )
    person = {"name": name, "age": age, "city": city}
    return {"prompt": ASKED.format(sentence=sentence), "answer": {"const": person}}


if __name__ == "__main__":
    write_problems(Path(sys.argv[1]), Path(sys.argv[2]))
