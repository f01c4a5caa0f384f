"""Points of a search space: all of them, drawn ones, the ends of each dimension, and neighbours.

A point is the value of each dimension that is active at it; `settings` turns it into values of the run's keys. Draws
depend on the seed and the trial's number alone, so that a sweep that goes on draws what it drew before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from pydantic import JsonValue

from raydistill.config.sweep import (
    Choice,
    Dimension,
    Grid,
    Integers,
    LogUniform,
    Simplex,
    SweepConfig,
    Uniform,
    is_listed,
)

Point = dict[str, JsonValue]
"""Values by the name of the dimension; of a simplex, the list of its shares."""
MOST_LISTED = 20_000
"""Points up to which a space is listed as a whole, so that random draws do not repeat."""
FACTORS = (0.8, 1.2)
"""By which a number is multiplied when it is changed. Source: Jaderberg et al. 2017, arXiv 1711.09846, Sec. 4."""


def settings(sweep: SweepConfig, point: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The values of the run's keys at a point."""
    found: dict[str, JsonValue] = {}
    for name, value in point.items():
        dimension = sweep.space[name]
        if isinstance(dimension, Simplex):
            assert isinstance(value, list), "the shares of a simplex are a list"
            found.update(zip(dimension.keys, value, strict=True))
        else:
            found[name] = value
    return found


def shown(sweep: SweepConfig, point: Mapping[str, JsonValue]) -> str:
    """A point as on the command line."""
    return ", ".join(f"{key}={value}" for key, value in settings(sweep, point).items())


def listed(dimension: Dimension) -> Sequence[JsonValue]:
    """All values of a dimension for which `is_listed` holds."""
    match dimension:
        case Grid() | Choice():
            return dimension.values
        case Integers():
            return range(dimension.low, dimension.high + 1, dimension.step)
        case Simplex(steps=int(steps)):
            return [[part / steps for part in parts] for parts in _compositions(steps, len(dimension.keys))]
    raise AssertionError(f"a dimension of kind {dimension.kind} cannot be listed")


def _compositions(total: int, count: int) -> Iterator[list[int]]:
    """All lists of `count` whole numbers ≥ 0 that sum to `total`: bars between stars."""
    for bars in combinations(range(total + count - 1), count - 1):
        ends = [-1, *bars, total + count - 1]
        yield [high - low - 1 for low, high in pairwise(ends)]


def size(sweep: SweepConfig) -> float:
    """Points of the space without its conditions, which only leave out some; infinite where numbers are drawn."""
    return math.prod(_num_values(dimension) for dimension in sweep.space.values())


def _num_values(dimension: Dimension) -> float:
    if isinstance(dimension, Simplex) and dimension.steps:
        return math.comb(dimension.steps + len(dimension.keys) - 1, len(dimension.keys) - 1)
    return len(listed(dimension)) if is_listed(dimension) else math.inf


def all_points(sweep: SweepConfig) -> list[Point]:
    """Every combination of the values of a space whose dimensions can all be listed; the first dimension varies
    slowest."""
    points: list[Point] = [{}]
    for name in ordered(sweep):
        dimension = sweep.space[name]
        points = [
            {**point, name: value} if active else point
            for point in points
            for active in [is_active(dimension, point)]
            for value in (listed(dimension) if active else [None])
        ]
    return points


def ordered(sweep: SweepConfig) -> list[str]:
    """The dimensions, each after those that its conditions name, else in the order of the file."""
    names: list[str] = []
    while len(names) < len(sweep.space):
        names.append(next(n for n, d in sweep.space.items() if n not in names and set(d.when) <= set(names)))
    return names


def is_active(dimension: Dimension, point: Mapping[str, JsonValue]) -> bool:
    """Whether a dimension's conditions hold at a point; they do not where a key that they name is not set."""
    return all(
        name in point and any(_same(point[name], value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        for name, wanted in dimension.when.items()
    )


def _same(found: JsonValue, wanted: JsonValue) -> bool:
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def drawn_points(sweep: SweepConfig, count: int) -> list[Point]:
    """The first `count` points at random; fewer when the space has fewer. A space that can be listed is drawn from
    without repeating a point."""
    if size(sweep) <= MOST_LISTED:
        points = all_points(sweep)
        random.Random(f"{sweep.seed}").shuffle(points)
        return points[:count]
    return [draw(sweep, random.Random(f"{sweep.seed}/{number}")) for number in range(count)]


def draw(sweep: SweepConfig, rng: random.Random) -> Point:
    """One point at random."""
    point: Point = {}
    for name in ordered(sweep):
        value = _draw(sweep.space[name], rng)  # also where it is not active: other draws do not depend on it
        if is_active(sweep.space[name], point):
            point[name] = value
    return point


def _draw(dimension: Dimension, rng: random.Random) -> JsonValue:
    match dimension:
        case Uniform(low=low, high=high):
            return rng.uniform(low, high)
        case LogUniform(low=low, high=high):
            return _within(dimension, math.exp(rng.uniform(math.log(low), math.log(high))))
        case Simplex(steps=None):
            parts = [rng.gammavariate(dimension.concentration, 1.0) for _ in dimension.keys]
            return [part / sum(parts) for part in parts]
    return rng.choice(listed(dimension))


def flat_simplex(uniforms: list[float]) -> list[float]:
    """Shares, uniform over the simplex, out of one fewer numbers uniform in [0, 1], by breaking a stick.

    The i-th piece is a Beta(1, m - i) share of what is left, whose quantile is 1 - (1 - u)^(1 / (m - i)).
    Source: Devroye 1986, "Non-Uniform Random Variate Generation", Sec. XI.4.1.
    """
    shares, left = [], 1.0
    for index, u in enumerate(uniforms):
        share = left * (1 - (1 - u) ** (1 / (len(uniforms) - index)))
        shares.append(share)
        left -= share
    return [*shares, left]


def _within(dimension: Uniform | LogUniform, value: float) -> float:
    return min(max(value, dimension.low), dimension.high)


def changed(sweep: SweepConfig, point: Mapping[str, JsonValue], rng: random.Random, *, resample: float) -> Point:
    """The point of a worse member of a population: each value drawn anew with probability `resample`, else a number
    multiplied by one of `FACTORS` (shares: each by one, then normalised) and a listed value moved by one place."""
    return {
        name: _draw(sweep.space[name], rng) if rng.random() < resample else _near(sweep.space[name], value, rng)
        for name, value in point.items()
    }


def _near(dimension: Dimension, value: JsonValue, rng: random.Random) -> JsonValue:
    match dimension:
        case Uniform() | LogUniform():
            assert isinstance(value, int | float), "a value of a range is a number"
            return _within(dimension, value * rng.choice(FACTORS))
        case Simplex(steps=None):
            assert isinstance(value, list), "the shares of a simplex are a list"
            parts = [part * rng.choice(FACTORS) for part in value if isinstance(part, int | float)]
            return [part / sum(parts) for part in parts]
        case Grid() | Integers():
            values = listed(dimension)
            place = values.index(value) + rng.choice((-1, 1))
            return values[min(max(place, 0), len(values) - 1)]
    return rng.choice(listed(dimension))


def probes(sweep: SweepConfig) -> Iterator[tuple[str, Point]]:
    """For each dimension, its listed values, or its ends and a value between them, each at a point at which it is
    active: what the schema must accept before a trial begins. Yields the dimension's name and the point."""
    for name, dimension in sweep.space.items():
        for value in _ends(dimension):
            yield name, {**_conditions_of(sweep, name), name: value}


def _ends(dimension: Dimension) -> Sequence[JsonValue]:
    match dimension:
        case Uniform(low=low, high=high) | LogUniform(low=low, high=high):
            return [low, high, low + (high - low) / math.pi]  # one between, which is no whole number
        case Integers():
            return [dimension.low, listed(dimension)[-1]]
        case Simplex():
            count = len(dimension.keys)
            corners: list[JsonValue] = [[float(i == j) for j in range(count)] for i in range(count)]
            return [[1 / count] * count, *corners]
    return listed(dimension)


def _conditions_of(sweep: SweepConfig, name: str) -> Point:
    """A point at which the conditions of a dimension hold."""
    point: Point = {}
    for other, wanted in sweep.space[name].when.items():
        point |= _conditions_of(sweep, other)
        point[other] = wanted[0] if isinstance(wanted, list) and wanted else wanted
    return point
