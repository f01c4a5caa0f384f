"""The accelerators that the stages of a run are counted on, and what their hours cost together."""

from __future__ import annotations

from raydistill.config.accelerators import without_price
from raydistill.config.base import Config
from raydistill.config.schema import RunConfig
from raydistill.plan.accelerators import ACCELERATORS
from raydistill.plan.words import UNKNOWN, bytes_of, hours_of, si


class Hardware(Config):
    """Accelerators that hours are counted on: a stage's own where it asks for one, else that of `plan`."""

    teacher: str
    """What teachers run on."""
    train: str
    """What students are trained on."""
    utilisation: float
    """Share of the peak that is reached."""

    def rate(self, accelerator: str) -> float | None:
        """FLOP per second of one `accelerator`; None for one whose peak is not known."""
        known = ACCELERATORS.get(accelerator)
        return known.flops * self.utilisation if known else None


class Bill(Config):
    """What all stages of a plan need together."""

    hours: dict[str, float | None]
    """Hours by accelerator; None where a part is not known."""
    price: float | None
    """Price of those that have one."""
    unpriced: tuple[str, ...]
    """Accelerators that have none, where prices are given."""


class AnyPlan(Config):
    """What the plan of every run says."""

    name: str
    """Name of the run."""
    hardware: Hardware
    """Accelerators that hours are counted on."""
    workers: int
    """Training workers; the fewest when training is elastic."""
    bill: Bill
    """What all stages need together."""
    missing: tuple[str, ...]
    """What could not be known, and why."""

    @property
    def hours(self) -> float | None:
        """All accelerator hours; None when a part is not known."""
        return total_of([*self.bill.hours.values()])

    @property
    def price(self) -> float | None:
        """Price of all hours that have one, when one is configured."""
        return self.bill.price


def hardware_of(config: RunConfig, missing: list[str]) -> Hardware:
    """The accelerators of `config`; those whose rate is not known are added to `missing`."""
    resources, assumed = config.resources, config.plan.accelerator
    teacher, train = resources.teacher.accelerator or assumed, resources.train.accelerator or assumed
    for name in dict.fromkeys((teacher, train)):
        if name not in ACCELERATORS:
            missing.append(f"hours of {name}: its rate is not known, only those of {', '.join(ACCELERATORS)}")
    return Hardware(teacher=teacher, train=train, utilisation=config.plan.utilisation)


def hours_at(flops: float | None, rate: float | None) -> float | None:
    """Hours that `flops` take at `rate` FLOP per second."""
    if flops is None or rate is None:
        return 0.0 if flops == 0 else None
    return flops / rate / 3600


def total_of(values: list[float | None]) -> float | None:
    """Their sum, None when one of them is not known."""
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def bill_of(config: RunConfig, *parts: tuple[str, float | None]) -> Bill:
    """The sum of `parts`, each an accelerator and its hours."""
    hours = {name: total_of([h for other, h in parts if other == name]) for name, _ in parts}
    prices = {name: config.plan.price_of(name) for name, h in hours.items() if h != 0}
    unpriced = tuple(name for name, price in prices.items() if price is None)
    costs = [None if (h := hours[name]) is None else h * price for name, price in prices.items() if price is not None]
    if config.plan.price_per_hour is None:
        return Bill(hours=hours, price=None, unpriced=())
    return Bill(hours=hours, price=None if unpriced and not costs else total_of([*costs]), unpriced=unpriced)


def baseline_hours(config: RunConfig, training: float | None) -> float | None:
    """Hours of the second training, without a teacher, where there is one; its phases take as long as the first's."""
    return training if config.evaluate.baseline and any(p.recipe.uses_teacher for p in config.phases) else 0.0


def total_lines(plan: AnyPlan, baseline: float | None, left_out: str) -> list[tuple[str, str]]:
    """The end of a plan, for a terminal; `left_out` says what it does not count."""
    lines = [("baseline", f"{hours_of(baseline, plan.hardware.train)} (the same student without a teacher)")]
    return [*(lines if baseline != 0 else []), *bill_lines(plan.bill), ("", f"({left_out})")]


def hardware_lines(hardware: Hardware) -> list[tuple[str, str]]:
    """What hours are counted on, for a terminal."""
    if hardware.teacher == hardware.train:
        return _device("accelerator", hardware.train, hardware.utilisation)
    teacher = _device("teachers on", hardware.teacher, hardware.utilisation)
    return [*teacher, *_device("training on", hardware.train, hardware.utilisation)]


def _device(label: str, name: str, utilisation: float) -> list[tuple[str, str]]:
    device = ACCELERATORS.get(name)
    if device is None:
        return [(label, name)]
    return [
        (label, f"{name}, {si(device.flops, 'FLOP/s')} dense bf16, {bytes_of(device.memory_bytes)}"),
        ("", f"({device.source}; hours at {utilisation:.0%} of the peak)"),
    ]


def bill_lines(bill: Bill) -> list[tuple[str, str]]:
    """Hours and money, for a terminal."""
    used = {name: h for name, h in bill.hours.items() if h != 0} or bill.hours
    lines = [("all", ", ".join(f"{hours_of(h, name)}{f' of {name}' * (h is None)}" for name, h in used.items()))]
    if bill.price is not None or bill.unpriced:
        price = UNKNOWN if bill.price is None else f"{bill.price:,.2f}"
        lines.append(("price", ", ".join(filter(None, (price, without_price(bill.unpriced))))))
    return lines
