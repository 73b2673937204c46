"""Grade-school word problems with worked answers, generated from a seed: the `arithmetic` domain of the demo texts.

A problem is a question of a few sentences, one to three steps that each state an equation such as "3 * 4 = 12", and a
last line "#### 12" with the result. All numbers are whole and positive, every division is exact. The same seed gives
the same text under every Python version: only `Random.random` is used, whose sequence the language guarantees.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

# fmt: off
NAMES = (
    "Aisha", "Amara", "Anton", "Beatriz", "Bram", "Carmen", "Chidi", "Clara", "Daan", "Dario", "Elif", "Emeka",
    "Esther", "Farid", "Fleur", "Gita", "Hana", "Hugo", "Ines", "Ivo", "Jasper", "Joan", "Kaito", "Karin", "Leo",
    "Lotte", "Lucia", "Malik", "Marta", "Mei", "Mina", "Nadia", "Nils", "Olga", "Omar", "Paulo", "Petra", "Quinn",
    "Rafael", "Rosa", "Samir", "Sofia", "Tariq", "Tessa", "Uma", "Viktor", "Wanda", "Yara", "Yusuf", "Zoe",
)
THINGS = (
    "apples", "badges", "beads", "buttons", "cards", "coins", "marbles", "pencils", "postcards", "seashells",
    "stamps", "stickers",
)
CONTAINERS = ("bags", "baskets", "boxes", "crates", "drawers", "jars", "tins", "trays")
CROPS = ("carrots", "cabbages", "leeks", "onions", "potatoes", "pumpkins", "radishes", "turnips")
# fmt: on


@dataclass(frozen=True)
class Equation:
    """One step of a worked answer: `str` gives "3 * 4 = 12", `value` is 12."""

    left: str
    value: int

    def __str__(self) -> str:
        return f"{self.left} = {self.value}"


def plus(*terms: int) -> Equation:
    """The sum of all terms."""
    return Equation(" + ".join(map(str, terms)), sum(terms))


def minus(start: int, *taken: int) -> Equation:
    """What is left of `start`."""
    return Equation(" - ".join(map(str, (start, *taken))), start - sum(taken))


def times(first: int, second: int) -> Equation:
    """The product."""
    return Equation(f"{first} * {second}", first * second)


def over(total: int, parts: int) -> Equation:
    """The quotient of an exact division; a template that asks for another one is wrong."""
    if total % parts:
        raise ArithmeticError(f"{total} / {parts} is not whole")
    return Equation(f"{total} / {parts}", total // parts)


class Draws:
    """The random choices of one generator.

    Parameters
    ----------
    seed : int
        Determines every later draw.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._random.random() * (high - low + 1))

    def several(self, options: Sequence[str], count: int) -> list[str]:
        """That many different options, in random order."""
        rest = list(options)
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(count)]

    def pick(self, options: Sequence[str]) -> str:
        """One option."""
        return options[self.integer(0, len(options) - 1)]

    def people(self, count: int) -> list[str]:
        """Different first names."""
        return self.several(NAMES, count)


@dataclass(frozen=True)
class Problem:
    """A word problem: the question, the sentences of the worked answer, the result."""

    question: str
    steps: tuple[str, ...]
    result: int

    def __str__(self) -> str:
        return "\n".join(
            (f"Question: {self.question}", f"Answer: {self.steps[0]}", *self.steps[1:], f"#### {self.result}")
        )


Template = Callable[[Draws], Problem]
TEMPLATES: list[Template] = []


def template(function: Template) -> Template:
    """Put a function that draws one problem on the list."""
    TEMPLATES.append(function)
    return function


# One step


@template
def full_containers(draws: Draws) -> Problem:
    name, thing, container = draws.pick(NAMES), draws.pick(THINGS), draws.pick(CONTAINERS)
    count, each = draws.integer(3, 15), draws.integer(4, 30)
    total = times(count, each)
    return Problem(
        f"{name} has {count} {container} with {each} {thing} in each of them. How many {thing} does {name} have?",
        (f"{count} {container} with {each} {thing} each hold {total} {thing}.",),
        total.value,
    )


@template
def ages(draws: Draws) -> Problem:
    older, younger = draws.people(2)
    age, difference = draws.integer(14, 60), draws.integer(2, 12)
    result = minus(age, difference)
    return Problem(
        f"{older} is {age} years old, and {younger} is {difference} years younger. How old is {younger}?",
        (f"{younger} is {result} years old.",),
        result.value,
    )


@template
def pages_per_day(draws: Draws) -> Problem:
    name, days, per_day = draws.pick(NAMES), draws.integer(3, 14), draws.integer(12, 45)
    result = over(days * per_day, days)
    return Problem(
        f"A library book of {days * per_day} pages has to be returned in {days} days. "
        f"How many pages must {name} read every day to finish it in time?",
        (f"{name} must read {result} pages a day.",),
        result.value,
    )


@template
def three_sums_of_money(draws: Draws) -> Problem:
    name = draws.pick(NAMES)
    bread, cheese, fruit = draws.integer(2, 6), draws.integer(4, 14), draws.integer(3, 11)
    result = plus(bread, cheese, fruit)
    return Problem(
        f"At the market {name} pays ${bread} for bread, ${cheese} for cheese and ${fruit} for fruit. "
        f"How many dollars does {name} spend?",
        (f"Together the shopping costs {result} dollars.",),
        result.value,
    )


# Two steps


@template
def given_away(draws: Draws) -> Problem:
    (name, friend), thing, container = draws.people(2), draws.pick(THINGS), draws.pick(CONTAINERS)
    count, each = draws.integer(3, 12), draws.integer(6, 24)
    given = draws.integer(2, 15)
    total = times(count, each)
    left = minus(total.value, given)
    return Problem(
        f"{name} fills {count} {container} with {each} {thing} each and gives {given} {thing} to {friend}. "
        f"How many {thing} does {name} have left?",
        (f"First there are {total} {thing}.", f"After the gift {name} has {left} {thing} left."),
        left.value,
    )


@template
def shared_with_friends(draws: Draws) -> Problem:
    (name, other), thing = draws.people(2), draws.pick(THINGS)
    friends, share = draws.integer(3, 9), draws.integer(4, 16)
    mine = draws.integer(2, friends * share - 2)
    pooled = plus(mine, friends * share - mine)
    result = over(pooled.value, friends)
    return Problem(
        f"{name} has {mine} {thing} and {other} has {friends * share - mine}. They put them together and divide them "
        f"equally among {friends} children. How many {thing} does each child get?",
        (f"Together they have {pooled} {thing}.", f"Each child gets {result} {thing}."),
        result.value,
    )


@template
def change_from_a_note(draws: Draws) -> Problem:
    name, article = draws.pick(NAMES), draws.pick(("notebooks", "sandwiches", "tickets", "tulips", "cups of tea"))
    count, price = draws.integer(2, 8), draws.integer(2, 6)
    note = draws.integer(5, 10) * 10
    cost = times(count, price)
    change = minus(note, cost.value)
    return Problem(
        f"{name} buys {count} {article} at ${price} each and pays with ${note}. How much change does {name} receive?",
        (f"The {article} cost {cost} dollars.", f"The change is {change} dollars."),
        change.value,
    )


@template
def rows_of_vegetables(draws: Draws) -> Problem:
    name, (first, second) = draws.pick(NAMES), draws.several(CROPS, 2)
    rows, each, more = draws.integer(4, 12), draws.integer(8, 25), draws.integer(20, 90)
    planted = times(rows, each)
    total = plus(planted.value, more)
    return Problem(
        f"In the garden {name} plants {rows} rows of {each} {first} and then {more} {second}. "
        "How many vegetables are there in the garden?",
        (f"The rows hold {planted} {first}.", f"With the {second} there are {total} vegetables."),
        total.value,
    )


@template
def train_ride(draws: Draws) -> Problem:
    first_hours, second_hours, speed = draws.integer(2, 5), draws.integer(2, 6), draws.integer(6, 14) * 10
    vehicle = draws.pick(("train", "bus", "lorry", "coach"))
    hours = plus(first_hours, second_hours)
    distance = times(hours.value, speed)
    return Problem(
        f"A {vehicle} drives for {first_hours} hours, stops for lunch and then drives for {second_hours} hours more. "
        f"While it moves it covers {speed} kilometers an hour. How many kilometers does it travel?",
        (f"The {vehicle} moves for {hours} hours.", f"It travels {distance} kilometers."),
        distance.value,
    )


@template
def fewer_than(draws: Draws) -> Problem:
    (first, second), thing = draws.people(2), draws.pick(THINGS)
    many, fewer = draws.integer(30, 90), draws.integer(5, 25)
    less = minus(many, fewer)
    both = plus(many, less.value)
    return Problem(
        f"{first} collected {many} {thing} and {second} collected {fewer} fewer. "
        f"How many {thing} did they collect together?",
        (f"{second} collected {less} {thing}.", f"Together they collected {both} {thing}."),
        both.value,
    )


@template
def half_of_the_audience(draws: Draws) -> Problem:
    rows, each, event = (
        draws.integer(5, 20),
        draws.integer(4, 15) * 2,
        draws.pick(("concert", "play", "film", "lecture")),
    )
    seats = times(rows, each)
    taken = over(seats.value, 2)
    return Problem(
        f"A hall has {rows} rows of {each} seats. At the {event} exactly half of the seats were taken. "
        "How many people were sitting in the hall?",
        (f"The hall has {seats} seats.", f"Half of them is {taken}, so {taken.value} people were sitting there."),
        taken.value,
    )


@template
def remaining_distance(draws: Draws) -> Problem:
    name, way = draws.pick(NAMES), draws.pick(("walks", "cycles", "runs", "rows"))
    days, daily = draws.integer(3, 9), draws.integer(6, 20)
    rest = draws.integer(5, 40)
    done = times(days, daily)
    left = minus(done.value + rest, done.value)
    return Problem(
        f"A route along the river is {done.value + rest} miles long. {name} {way} {daily} miles a day for {days} days. "
        f"How many miles are still to go?",
        (f"In {days} days {name} covers {done} miles.", f"There are {left} miles still to go."),
        left.value,
    )


@template
def eggs_in_boxes(draws: Draws) -> Problem:
    name, broken, boxes = draws.pick(NAMES), draws.integer(2, 11), draws.integer(4, 20)
    size = 6 if draws.integer(0, 1) else 12
    good = minus(boxes * size + broken, broken)
    result = over(good.value, size)
    return Problem(
        f"The hens on the farm of {name} lay {boxes * size + broken} eggs in a week. {broken} of them break, "
        f"and the rest is packed in boxes of {size}. How many boxes are filled?",
        (f"{good} eggs are left.", f"They fill {result} boxes."),
        result.value,
    )


@template
def twice_as_heavy(draws: Draws) -> Problem:
    animal, other = draws.several(("calf", "donkey", "foal", "goat", "pig", "sheep", "ram"), 2)
    weight, factor = draws.integer(15, 60), draws.integer(2, 4)
    word = ("twice", "three times", "four times")[factor - 2]
    heavy = times(factor, weight)
    both = plus(heavy.value, weight)
    return Problem(
        f"A {animal} weighs {word} as much as a {other}. The {other} weighs {weight} kilograms. "
        "How many kilograms do the two weigh together?",
        (f"The {animal} weighs {heavy} kilograms.", f"Together they weigh {both} kilograms."),
        both.value,
    )


# Three steps


@template
def wages_and_bicycle(draws: Draws) -> Problem:
    name = draws.pick(NAMES)
    hours, wage, weeks = draws.integer(10, 38), draws.integer(11, 24), draws.integer(2, 5)
    spent = draws.integer(3, 20) * 10
    weekly = times(hours, wage)
    earned = times(weeks, weekly.value)
    left = minus(earned.value, spent)
    return Problem(
        f"{name} works {hours} hours a week for ${wage} an hour. After {weeks} weeks "
        f"{name} buys a bicycle for ${spent}. How many dollars are left?",
        (
            f"In one week {name} earns {weekly} dollars.",
            f"In {weeks} weeks that makes {earned} dollars.",
            f"After buying the bicycle {left} dollars are left.",
        ),
        left.value,
    )


@template
def two_kinds_of_ticket(draws: Draws) -> Problem:
    place = draws.pick(("museum", "swimming pool", "zoo", "castle", "theater"))
    adults, children = draws.integer(3, 30), draws.integer(4, 60)
    child_price = draws.integer(2, 7)
    adult_price = child_price + draws.integer(2, 8)
    from_adults, from_children = times(adults, adult_price), times(children, child_price)
    total = plus(from_adults.value, from_children.value)
    return Problem(
        f"A ticket for the {place} costs ${adult_price} for adults and ${child_price} for children. "
        f"On Monday {adults} adults and {children} children come. How many dollars does the {place} take in?",
        (
            f"The adults pay {from_adults} dollars.",
            f"The children pay {from_children} dollars.",
            f"Together they pay {total} dollars.",
        ),
        total.value,
    )


@template
def water_tank(draws: Draws) -> Problem:
    start, inflow, outflow = draws.integer(50, 200), draws.integer(12, 30), draws.integer(3, 11)
    minutes = draws.integer(5, 25)
    gain = minus(inflow, outflow)
    added = times(gain.value, minutes)
    result = plus(start, added.value)
    return Problem(
        f"A tank holds {start} liters of water. Every minute {inflow} liters flow in and {outflow} liters flow out. "
        f"How many liters are in the tank after {minutes} minutes?",
        (
            f"Each minute the tank gains {gain} liters.",
            f"In {minutes} minutes it gains {added} liters.",
            f"Then there are {result} liters in it.",
        ),
        result.value,
    )


@template
def three_children(draws: Draws) -> Problem:
    (first, second, third), thing = draws.people(3), draws.pick(THINGS)
    base, factor, more = draws.integer(6, 25), draws.integer(2, 5), draws.integer(3, 20)
    much = times(factor, base)
    most = plus(much.value, more)
    total = plus(base, much.value, most.value)
    word = ("twice", "three times", "four times", "five times")[factor - 2]
    return Problem(
        f"{first} has {base} {thing}. {second} has {word} as many as {first}, "
        f"and {third} has {more} more than {second}. How many {thing} do the three have altogether?",
        (
            f"{second} has {much} {thing}.",
            f"{third} has {most} {thing}.",
            f"The three have {total} {thing}.",
        ),
        total.value,
    )


@template
def bakery_day(draws: Draws) -> Problem:
    name, good = draws.pick(NAMES), draws.pick(("bagels", "muffins", "pies", "rolls", "tarts"))
    trays, each, price = draws.integer(4, 12), draws.integer(8, 24), draws.integer(2, 5)
    unsold = draws.integer(3, 20)
    baked = times(trays, each)
    sold = minus(baked.value, unsold)
    income = times(sold.value, price)
    return Problem(
        f"{name} bakes {trays} trays of {each} {good} and sells them for ${price} each. In the evening {unsold} {good} "
        f"are left over. How many dollars did {name} earn?",
        (
            f"{name} bakes {baked} {good}.",
            f"Of these {sold} {good} are sold.",
            f"That brings in {income} dollars.",
        ),
        income.value,
    )


@template
def fence(draws: Draws) -> Problem:
    name, width, price = draws.pick(NAMES), draws.integer(6, 25), draws.integer(3, 15)
    length = width + draws.integer(3, 20)
    half = plus(length, width)
    around = times(2, half.value)
    cost = times(around.value, price)
    return Problem(
        f"{name} puts a fence around a field that is {length} meters long and {width} meters wide. "
        f"One meter of fence costs ${price}. How many dollars does the whole fence cost?",
        (
            f"One long and one short side measure {half} meters.",
            f"The way around the field is {around} meters.",
            f"The fence costs {cost} dollars.",
        ),
        cost.value,
    )


@template
def buses_for_a_trip(draws: Draws) -> Problem:
    buses, seats = draws.integer(2, 8), draws.integer(20, 50)
    teachers = draws.integer(3, 15)
    schools = draws.integer(2, 6)
    each = (buses * seats - teachers) // schools
    teachers = buses * seats - schools * each  # so that the last bus is full
    pupils = times(schools, each)
    people = plus(pupils.value, teachers)
    result = over(people.value, seats)
    return Problem(
        f"{schools} schools send {each} pupils each on a trip, together with {teachers} teachers. "
        f"Each bus has {seats} seats, and every seat is taken. How many buses are there?",
        (
            f"There are {pupils} pupils.",
            f"With the teachers that makes {people} people.",
            f"They fill {result} buses.",
        ),
        result.value,
    )


@template
def saving_for_something(draws: Draws) -> Problem:
    name, goal = draws.pick(NAMES), draws.pick(("guitar", "tent", "telescope", "pair of skates", "camera"))
    months, saved, gift = draws.integer(3, 12), draws.integer(8, 35), draws.integer(10, 60)
    price = months * saved + gift + draws.integer(5, 80)
    pocket_money = times(months, saved)
    owned = plus(pocket_money.value, gift)
    missing = minus(price, owned.value)
    return Problem(
        f"{name} wants a {goal} that costs ${price}. For {months} months {name} saves ${saved} a month, "
        f"and an aunt gives ${gift}. How many dollars are still missing?",
        (
            f"The savings are {pocket_money} dollars.",
            f"With the gift {name} has {owned} dollars.",
            f"There are still {missing} dollars missing.",
        ),
        missing.value,
    )


@template
def ribbon(draws: Draws) -> Problem:
    name, pieces, piece = draws.pick(NAMES), draws.integer(4, 15), draws.integer(5, 30)
    rolls = draws.integer(2, 6)
    rest = draws.integer(3, 40)
    rest += -(pieces * piece + rest) % rolls  # so that the rolls have a whole length
    roll = (pieces * piece + rest) // rolls
    total, used = times(rolls, roll), times(pieces, piece)
    left = minus(total.value, used.value)
    return Problem(
        f"{name} has {rolls} rolls of ribbon, each {roll} inches long, and cuts off {pieces} pieces of {piece} inches. "
        "How many inches of ribbon are left?",
        (f"The rolls are {total} inches long.", f"The pieces take {used} inches.", f"So {left} inches are left."),
        left.value,
    )


@template
def average_score(draws: Draws) -> Problem:
    name, game = draws.pick(NAMES), draws.pick(("a quiz", "a game of darts", "a spelling test", "an archery contest"))
    first, second, mean = draws.integer(10, 40), draws.integer(10, 40), draws.integer(28, 45)
    third = 3 * mean - first - second
    total = plus(first, second, third)
    result = over(total.value, 3)
    return Problem(
        f"In the three rounds of {game} {name} scores {first}, {second} and {third} points. "
        f"What is the average score of {name}?",
        (f"The three scores add up to {total} points.", f"The average is {result} points."),
        result.value,
    )


def generate(seed: int, size: int, known: Collection[str] = ()) -> list[str]:
    """Problems as text, at least `size` characters in total; every template is used before one comes back.

    Parameters
    ----------
    seed : int
        The same seed gives the same problems.
    size : int
        Characters wanted. The last problem completes the volume, so the result is longer by part of a problem.
    known : collection of str
        Problems that must not be generated again, for splits that share none.
    """
    draws, seen, problems = Draws(seed), set(known), list[str]()
    deck: list[int] = []
    while sum(map(len, problems)) < size:
        deck = deck or list(range(len(TEMPLATES)))
        make = TEMPLATES[deck.pop(draws.integer(0, len(deck) - 1))]
        text = str(make(draws))
        if text not in seen:
            seen.add(text)
            problems.append(text)
    return problems
