"""Which parameters are trained, with which learning rate and weight decay."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from raydistill.config.training import OptimizerConfig, TrainableRule
from raydistill.errors import ConfigError


@dataclass(slots=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    """The rule that chose them (`all` when there are no rules), plus ` (no decay)` for biases and norms."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Numbers in the group."""
        return sum(full_numel(p) for p in self.parameters)


def full_numel(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also when ZeRO-3 has left only a partition of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_groups(
    module: nn.Module, rules: Sequence[TrainableRule], optimizer: OptimizerConfig, *, where: str
) -> list[Group]:
    """Sort the parameters of `module` into optimizer groups and freeze the others (`requires_grad=False`).

    The first rule whose expression is found in a name decides; unmatched parameters are frozen. A parameter with
    several names (tied weights) belongs to the group of its first name. Biases and norm scales (fewer than two axes)
    are not decayed unless `optimizer.decay_norms_and_biases` or the rule's own `weight_decay` says so.

    Raises `ConfigError` for a rule that decides nothing, a broken expression, or when nothing is left to train.
    """
    rules = rules or (TrainableRule(match=""),)
    expressions = [_compiled(rule, where) for rule in rules]
    groups: dict[tuple[int, bool], Group] = {}
    decided = [0] * len(rules)
    for name, parameter in module.named_parameters():
        index = next((i for i, e in enumerate(expressions) if e.search(name)), None)
        if index is not None:
            decided[index] += 1
        parameter.requires_grad_(index is not None and rules[index].lr_scale > 0)
        if index is None or not parameter.requires_grad:
            continue
        rule = rules[index]
        spared = rule.weight_decay is None and parameter.ndim < 2 and not optimizer.decay_norms_and_biases
        decay = 0.0 if spared else optimizer.weight_decay if rule.weight_decay is None else rule.weight_decay
        if (index, spared) not in groups:
            label = (rule.match or "all") + (" (no decay)" if spared else "")
            groups[index, spared] = Group(label, optimizer.lr * rule.lr_scale, decay)
        groups[index, spared].names.append(name)
        groups[index, spared].parameters.append(parameter)
    names = [n for n, _ in module.named_parameters()]
    for rule, expression, count in zip(rules, expressions, decided, strict=True):
        if count == 0:
            raise ConfigError(_matches_nothing(rule, expression, names, where))
    if not groups:
        raise ConfigError(f"{where}: every parameter is frozen; wanted at least one rule with lr_scale above 0.")
    return [groups[key] for key in sorted(groups)]


def player_groups(
    network: nn.Module, own: nn.Module, rules: Sequence[TrainableRule], optimizer: OptimizerConfig, *, where: str
) -> list[Group]:
    """Groups of the player `network`, which is the model `own` or holds it together with others.

    The rules choose among the parameters of `own`, by the names that they have there. What the player holds besides
    (maps between two widths, say) is trained whole, in groups that are named after the part.
    """
    groups = parameter_groups(own, rules, optimizer, where=where)
    known = {id(p) for p in own.parameters()}
    for part, module in network.named_children() if network is not own else ():
        if any(id(p) in known for p in module.parameters()) or not any(True for _ in module.parameters()):
            continue
        for group in parameter_groups(module, (), optimizer, where=f"{where}, {part}"):
            name = part if group.name == "all" else f"{part}{group.name.removeprefix('all')}"
            groups.append(
                Group(name, group.lr, group.weight_decay, [f"{part}.{n}" for n in group.names], group.parameters)
            )
    return groups


def groups_table(groups: Sequence[Group], module: nn.Module) -> str:
    """The groups, one line each, with counts, learning rates and what is frozen."""
    total = sum(full_numel(p) for p in module.parameters())
    trained = sum(g.num_parameters for g in groups)
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    rows += [
        (g.name, str(len(g.parameters)), f"{g.num_parameters:,}", f"{g.lr:g}", f"{g.weight_decay:g}") for g in groups
    ]
    frozen = sum(1 for p in module.parameters()) - sum(len(g.parameters) for g in groups)
    if frozen:
        rows.append(("frozen", str(frozen), f"{total - trained:,}", "-", "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [row[0].ljust(widths[0]) + "".join(f"  {row[i].rjust(widths[i])}" for i in range(1, 5)) for row in rows]
    return "\n".join(lines)


def _compiled(rule: TrainableRule, where: str) -> re.Pattern[str]:
    try:
        return re.compile(rule.match)
    except re.error as error:
        raise ConfigError(f"{where}: {rule.match!r} is not a regular expression: {error}") from error


def _matches_nothing(rule: TrainableRule, expression: re.Pattern[str], names: list[str], where: str) -> str:
    if any(expression.search(n) for n in names):
        return (
            f"{where}: the rule {rule.match!r} decides nothing, since earlier rules match all its parameters. "
            "The first match wins: move it up, or remove it."
        )
    plain = re.sub(r"[^\w.]+", "", rule.match).strip(".")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"{where}: the rule {rule.match!r} matches none of the {len(names)} parameters. "
        f"Names that come near: {', '.join(near)}"
    )
