from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_image_run import CAPTIONS, fake_image_run
from fake_run import fake_run
from PIL import Image

from raydistill.report import render_report, write_report
from raydistill.report.charts import (
    Bar,
    Scale,
    Series,
    dot_chart,
    histogram,
    line_chart,
    linear_ticks,
    log_ticks,
    number,
    smoothed,
    thinned,
)
from raydistill.report.curves import loss_figures, machine_figures, read_log
from raydistill.report.images import gallery, timestep_figures
from raydistill.report.page import benchmarks, stages
from raydistill.report.words import duration, lede, said, size
from raydistill.signals import JsonValue
from raydistill.storage import Store

FILES = ("config.json", "metrics.json", "metrics.jsonl", "samples.json", "cache_stats.json", "stages.json")
SECTIONS = ("result", "training", "benchmarks", "samples", "cache", "time", "settings")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class _Balance(HTMLParser):
    """Collects ids and checks that every tag is closed by its own end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _parsed(page: str) -> _Balance:
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_a_whole_run_gives_every_section_and_the_same_page_each_time(tmp_path: Path) -> None:
    run = Store(fake_run(tmp_path))
    write_report(run)
    page = run.read_text("report.html")
    assert [i for i in _parsed(page).ids if i in SECTIONS] == list(SECTIONS)
    assert render_report(run) == page


def test_the_page_reaches_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = render_report(Store(fake_run(tmp_path)))
    assert not re.findall(r"(?:src|href)=[\"'](?!#)|url\(|@import|<script|<link|https?://", page)


def test_markup_in_texts_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    run = Store(fake_run(tmp_path))
    content = json.loads(run.read_text("samples.json"))
    content["samples"][0]["outputs"]["student"] = "</div><script>alert(1)</script>"
    run.publish("samples.json", json.dumps(content))
    page = render_report(run)
    assert "<script>" not in page
    assert "<b>Prompts</b>" in _parsed(page).text
    assert "alert(1)" in _parsed(page).text


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_leaves_its_part_out_and_the_rest_in_place(tmp_path: Path, missing: str) -> None:
    run = Store(fake_run(tmp_path))
    run.delete(missing)
    _parsed(render_report(run))


def test_an_empty_run_folder_gives_a_page(tmp_path: Path) -> None:
    page = _parsed(render_report(Store(tmp_path)))
    assert not set(page.ids) & set(SECTIONS)


def test_a_run_without_a_baseline_says_nothing_of_one(tmp_path: Path) -> None:
    page = render_report(Store(fake_run(tmp_path, baseline=False)))
    assert "ithout a teacher" not in _parsed(page).text
    assert "None" not in _parsed(page).text


def test_results_of_the_harness_stand_among_the_benchmarks(tmp_path: Path) -> None:
    run = Store(fake_run(tmp_path))
    metrics = json.loads(run.read_text("metrics.json"))
    for role, value in (("teacher", 0.7), ("student", 0.6125)):
        metrics[role]["lm_eval"] = {"piqa": {"acc,none": value, "acc_stderr,none": 0.01, "sample_len": 4}}
    run.publish("metrics.json", json.dumps(metrics))
    found = benchmarks(metrics)
    assert found is not None
    row = found.rows[-1]
    assert (row.title, row.meaning, len(found.rows)) == ("piqa", "acc", 5)
    assert [(c.role, c.text) for c in row.cells if c.text != "–"] == [("teacher", "0.7"), ("student", "0.613")]
    _parsed(render_report(run))


def test_values_that_are_no_number_are_left_out_of_curves_and_table(tmp_path: Path) -> None:
    run = Store(fake_run(tmp_path))
    metrics = json.loads(run.read_text("metrics.json"))
    metrics["student"]["perplexity"] = math.nan
    run.publish("metrics.json", json.dumps(metrics))
    lines = [json.loads(line) for line in run.read_text("metrics.jsonl").splitlines()]
    lines[3]["loss"] = lines[4]["grad_norm"] = math.nan
    run.publish("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = render_report(run)
    assert not re.search(r"\bnan\b", page)


def test_phases_are_laid_end_to_end(tmp_path: Path) -> None:
    log = read_log(Store(fake_run(tmp_path)), "metrics.jsonl")
    assert log.phases == ((0.0, "warm"), (60.0, "full"))
    steps = [x for x, _ in log.points(lambda line: line.get("loss"))]
    assert steps == sorted(steps)
    assert steps[-1] == 300


def test_parts_that_repeat_the_loss_or_another_part_are_drawn_once(tmp_path: Path) -> None:
    run = Store(fake_run(tmp_path))
    log, baseline = read_log(run, "metrics.jsonl"), read_log(run, "baseline/metrics.jsonl")
    figures = {f.title: f for f in loss_figures(log, baseline)}
    assert list(figures) == [
        "Loss", "Cross-entropy", "Next-token accuracy", "Divergence from the teacher", "Agreement · smollm2",
    ]  # fmt: skip
    assert [name for name, _ in figures["Cross-entropy"].legend] == ["distilled", "without a teacher"]
    assert figures["Divergence from the teacher"].legend == ()


def test_waiting_is_a_share_of_the_time_between_two_lines(tmp_path: Path) -> None:
    lines = [
        {"phase": "a", "step": s, "loss": 1.0, "data_wait_seconds": 0.5, "seconds": 10.0 * s} for s in (1, 2, 3)
    ] + [{"phase": "b", "step": 1, "loss": 1.0, "data_wait_seconds": 4.0, "seconds": 8.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = next(
        f for f in machine_figures(read_log(Store(tmp_path), "metrics.jsonl")) if f.title.startswith("Waiting")
    )
    assert "distilled: 5\N{NO-BREAK SPACE}%" in figure.chart
    assert "distilled: 50\N{NO-BREAK SPACE}%" in figure.chart


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(0.013, 0.027) == pytest.approx([0.015, 0.02, 0.025])
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(0.001, 1000) == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100, 1000])
    assert len(log_ticks(3.1, 3.9)) >= 2


def test_thinning_keeps_the_mean_and_drops_what_is_no_number() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    found = thinned(points, 100)
    assert len(found) == 100
    assert sum(y for _, y in found) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned([(0, 1.0), (1, math.nan), (2, math.inf)]) == [(0, 1.0)]


def test_smoothing_a_line_leaves_it_a_line() -> None:
    points = [(float(i), 2.0 * i) for i in range(50)]
    assert [y for _, y in smoothed(points, 9)[10:40]] == pytest.approx([y for _, y in points[10:40]])


def test_a_logarithmic_scale_puts_equal_ratios_at_equal_distances() -> None:
    scale = Scale(1, 10_000, 0, 100, log=True)
    assert [scale(v) for v in (1, 10, 100, 1000, 10_000)] == pytest.approx([0, 25, 50, 75, 100])


def test_charts_survive_one_point_equal_values_and_nothing() -> None:
    for points in ([(1.0, 5.0)], [(1.0, 5.0), (2.0, 5.0)], [(1.0, 0.0), (2.0, 0.0)]):
        assert "NaN" not in line_chart([Series("a", points, "c0")], label="x").replace("nan", "NaN")
    assert line_chart([], label="x") == ""
    assert line_chart([Series("a", [(1.0, -1.0)], "c0")], label="x", log=True) == ""
    assert "nan" not in dot_chart([Bar("a", 0.0, "0", "c0")], label="x")
    assert "nan" not in histogram([0.0, 1.0], [0.0], label="x", tone="c0")


def test_numbers_are_short_and_exact_enough() -> None:
    nbsp = "\N{NO-BREAK SPACE}"
    assert [number(v) for v in (0, 1234, 12345, 134_515_008, 0.00012, 3e-5, 33.25)] == [
        "0", "1,234", f"12.3{nbsp}k", f"135{nbsp}M", "0.00012", "3e-5", "33.2",
    ]  # fmt: skip
    assert duration(2.41) == f"2.4{nbsp}s"
    assert duration(1380) == f"23{nbsp}min"
    assert duration(9000) == f"2{nbsp}h 30{nbsp}min"
    assert size(114_361_344) == f"114{nbsp}MB"
    assert said(0.6612, "share") == f"66.1{nbsp}%"
    assert said(None) == said(math.inf) == "–"


def test_gpu_time_and_money_are_told_by_stage_where_they_are_known() -> None:
    found: dict[str, JsonValue] = {
        "inputs": {"seconds": 5.0},
        "signals": {"seconds": 600.0, "gpu_seconds": 4800.0, "price": 2.5},
        "train": {"seconds": 900.0, "gpu_seconds": 7200.0, "price": 1234.0},
    }
    told = stages(found)
    assert told is not None
    assert [row[0] for row in told.rows] == ["inputs", "signals", "train", "all"]
    assert [row[2] for row in told.rows] == ["–", duration(4800.0), duration(7200.0), duration(12000.0)]
    assert [row[3] for row in told.rows] == ["–", "2.50", "1,234.00", "1,236.50"]
    without = stages({"train": {"seconds": 900.0}})
    assert without is not None
    assert (without.rows, without.price_total, without.gpu_total) == ((), None, None)


def test_what_is_an_upper_bound_or_has_no_price_is_said() -> None:
    found: dict[str, JsonValue] = {
        "signals": {"seconds": 600.0, "gpu_seconds": 4800.0, "gpu_at_most": True, "price": 2.5},
        "train": {"seconds": 900.0, "gpu_seconds": 7200.0, "unpriced": ["H100"]},
    }
    told = stages(found)
    assert told is not None
    assert [row[2] for row in told.rows] == [
        f"at most {duration(4800.0)}", duration(7200.0), f"at most {duration(12000.0)}",
    ]  # fmt: skip
    assert [row[3] for row in told.rows] == ["at most 2.50", "–", "at most 2.50"]
    assert told.unpriced == "without H100: no price given"


def test_the_lede_says_what_the_comparison_says() -> None:
    metrics = {
        "student": {"parameters": 50_000_000},
        "comparison": {
            "quality_metric": "perplexity", "teacher_quality": 10.0, "student_quality": 20.0,
            "student_init_quality": 40.0, "parameters_ratio": 0.25, "speed_ratio": 2.0, "gap_closed": 0.5,
        },
    }  # fmt: skip
    assert lede(metrics) == [
        "The student has 50\N{NO-BREAK SPACE}M parameters, 4 times fewer than its teacher, and runs 2 times as fast.",
        "Its held-out perplexity is 20, against 10 for the teacher and 40 before training.",
        "Distillation closed 50\N{NO-BREAK SPACE}% of the gap to the teacher.",
    ]
    same = {**metrics, "comparison": {**metrics["comparison"], "parameters_ratio": 1.0}}
    assert "parameters, as many as its teacher, and" in lede(same)[0]
    assert lede({}) == []


def test_an_image_run_shows_every_model_beside_its_teachers(tmp_path: Path) -> None:
    run = Store(fake_image_run(tmp_path))
    write_report(run)
    page = run.read_text("report.html")
    parsed = _parsed(page)
    assert [i for i in parsed.ids if i in SECTIONS] == ["result", "samples", "training", "cache", "time", "settings"]
    found = gallery(run, json.loads(run.read_text("samples.json")))
    assert found is not None
    assert [name for name, _ in found.heads] == [
        "Held-out image", "google", "twitter", "Without a teacher", "Distilled student", "Distilled, averaged",
    ]  # fmt: skip
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(sources) == len(CAPTIONS) * 6
    assert base64.b64decode(sources[4]) == run.read("samples/00-student.png")
    assert "flag: <b>Wales</b> & more" in parsed.text
    assert "(no caption)" in parsed.text
    assert "61 held-out samples with 244 draws of noise" in parsed.text
    for text in ("too few for 2,048 features", "Error to google", "Fréchet distance · default_1", "Each teacher"):
        assert text in parsed.text
    assert "None" not in parsed.text
    assert not re.search(r"\bnan\b", page)


@pytest.mark.parametrize(("weights", "role"), [("weights", "student"), ("ema", "student_ema")])
def test_the_exported_student_is_the_shaded_one(tmp_path: Path, weights: str, role: str) -> None:
    run = Store(fake_image_run(tmp_path))
    stored = json.loads(run.read_text("config.json"))
    stored["config"]["export"] = {"weights": weights}
    run.publish("config.json", json.dumps(stored))
    metrics = json.loads(run.read_text("metrics.json"))
    metrics["student_ema"]["by_timestep"]["mse_to/google"] = [7.25] * 10
    run.publish("metrics.json", json.dumps(metrics))
    page = render_report(run)
    assert set(re.findall(r'class="(\w+) exported', page)) == {role}
    each = page.partition("Error to each teacher by timestep")[2].partition("</figure>")[0]
    assert ("7.25" in each) == (weights == "ema")


def test_the_page_of_an_image_run_reaches_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = render_report(Store(fake_image_run(tmp_path)))
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:image/png;)|url\(|@import|<script|<link|https?://", page)


def test_errors_by_timestep_are_drawn_for_each_model_and_each_teacher(tmp_path: Path) -> None:
    metrics = json.loads(Store(fake_image_run(tmp_path)).read_text("metrics.json"))
    figures = {f.title: f for f in timestep_figures(metrics)}
    assert [name for name, _ in figures["Error to the teachers by timestep"].legend] == [
        "Teachers among themselves", "Untrained student", "Without a teacher", "Distilled student",
        "Distilled, averaged",
    ]  # fmt: skip
    assert figures["Error to each teacher by timestep"].legend == (("google", "c0"), ("twitter", "c1"))
    assert "Error to the truth by timestep" in figures
    assert "timestep 50" in figures["Error to the teachers by timestep"].chart


def test_an_only_teachers_error_to_itself_is_not_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    metrics = json.loads(Store(fake_image_run(tmp_path)).read_text("metrics.json"))
    metrics["teacher"]["by_timestep"]["mse_to_teacher"] = [0.0] * 10
    metrics["student"]["by_timestep"]["mse_to_noise"][3] = None
    del metrics["teachers"]
    first = timestep_figures(metrics)[0]
    assert "Teacher" not in [name for name, _ in first.legend]


def test_large_images_are_made_smaller_and_small_ones_keep_their_pixels(tmp_path: Path) -> None:
    small, large = (Store(fake_image_run(tmp_path / str(side), side=side)) for side in (32, 400))
    for run, pixelated, longest in ((small, True, 32), (large, False, 320)):
        found = gallery(run, json.loads(run.read_text("samples.json")))
        assert found is not None
        assert found.pixelated is pixelated
        uri = found.rows[0].images[1]
        assert uri is not None
        assert max(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size) == longest


def test_a_missing_image_leaves_a_dash(tmp_path: Path) -> None:
    run = Store(fake_image_run(tmp_path))
    run.delete("samples/01-student.png")
    found = gallery(run, json.loads(run.read_text("samples.json")))
    assert found is not None
    assert found.rows[1].images[4] is None
    _parsed(render_report(run))


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_of_an_image_run_leaves_its_part_out(tmp_path: Path, missing: str) -> None:
    run = Store(fake_image_run(tmp_path))
    run.delete(missing)
    _parsed(render_report(run))


def test_the_lede_of_denoisers_speaks_of_errors_and_of_what_is_possible(tmp_path: Path) -> None:
    metrics = json.loads(Store(fake_image_run(tmp_path)).read_text("metrics.json"))
    assert lede(metrics)[1] == (
        "Its held-out error to its teachers is 0.0132, against 0.0046 at best (as the teachers differ), 0.021 for the "
        "same student trained without one and 1.02 before training."
    )


def test_a_model_that_nobody_taught_is_called_trained(tmp_path: Path) -> None:
    run = Store(fake_image_run(tmp_path))
    metrics = json.loads(run.read_text("metrics.json"))
    for role in ("teacher", "teachers", "student_ce"):
        del metrics[role]
    run.publish("metrics.json", json.dumps(metrics))
    text = _parsed(render_report(run)).text
    assert "Trained student" in text
    assert "Before and after training" in text
    assert "Distilled student" not in text
