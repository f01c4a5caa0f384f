"""Rules become optimizer groups: first match wins, nothing silently ignored."""

from __future__ import annotations

import pytest
from regression import Tied, network

from raydistill.config.training import OptimizerConfig, TrainableRule
from raydistill.errors import ConfigError
from raydistill.train.parameters import groups_table, parameter_groups

OPTIMIZER = OptimizerConfig(lr=0.1, weight_decay=0.01)


def rule(match: str, **settings: float) -> TrainableRule:
    return TrainableRule.model_validate({"match": match, **settings})


def test_the_first_rule_that_matches_decides_and_the_unmatched_are_frozen() -> None:
    model = network()
    groups = parameter_groups(model, [rule(r"0\.weight", lr_scale=0.5), rule(r"^0\.")], OPTIMIZER, where="t")
    assert [(g.names, g.lr) for g in groups] == [(["0.weight"], 0.05), (["0.bias"], 0.1)]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


def test_a_scale_of_zero_freezes() -> None:
    model = network()
    groups = parameter_groups(model, [rule("bias", lr_scale=0), rule(".*")], OPTIMIZER, where="t")
    assert [g.names for g in groups] == [["0.weight", "2.weight"]]
    assert not model[0].bias.requires_grad


def test_biases_and_norms_are_not_decayed_unless_asked() -> None:
    def decay(optimizer: OptimizerConfig, *rules: TrainableRule) -> dict[str, float]:
        return {n: g.weight_decay for g in parameter_groups(network(), rules, optimizer, where="t") for n in g.names}

    assert decay(OPTIMIZER) == {"0.weight": 0.01, "2.weight": 0.01, "0.bias": 0.0, "2.bias": 0.0}
    assert set(decay(OPTIMIZER.model_copy(update={"decay_norms_and_biases": True})).values()) == {0.01}
    assert set(decay(OPTIMIZER, rule(".*", weight_decay=0.3)).values()) == {0.3}


def test_a_rule_that_matches_nothing_is_an_error_with_names_that_come_near() -> None:
    with pytest.raises(ConfigError, match=r"matches none of the 4 parameters.*2\.weight"):
        parameter_groups(network(), [rule(".*"), rule(r"^2\.weigth$")], OPTIMIZER, where="t")


def test_a_rule_behind_a_broader_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match="earlier rules match all its parameters"):
        parameter_groups(network(), [rule(".*"), rule("bias")], OPTIMIZER, where="t")


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        parameter_groups(network(), [rule(".*", lr_scale=0)], OPTIMIZER, where="t")


def test_a_tied_weight_is_in_one_group_once() -> None:
    groups = parameter_groups(Tied(), (), OPTIMIZER, where="t")
    assert [n for g in groups for n in g.names] == ["embed.weight", "norm.weight", "norm.bias"]


def test_the_table_counts_what_is_trained_and_what_is_frozen() -> None:
    model = network()
    table = groups_table(parameter_groups(model, [rule(r"^0\.")], OPTIMIZER, where="t"), model).splitlines()
    assert [line.split()[-4:] for line in table[1:]] == [
        ["1", "54", "0.1", "0.01"],
        ["1", "9", "0.1", "0"],
        ["2", "30", "-", "-"],
    ]
