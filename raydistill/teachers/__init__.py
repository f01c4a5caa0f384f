"""Frozen models that turn inputs into signals. A new one is a configuration section, a file here and a branch below."""

from __future__ import annotations

import torch

from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import NoisePredictionTeacher, TeacherConfig
from raydistill.config.teachers import TopKLogitsTeacher as TopKLogitsSection
from raydistill.models.denoiser import load_denoiser, process_of
from raydistill.models.load import load_language_model
from raydistill.signals import Teacher
from raydistill.teachers.logits import TopKLogitsTeacher
from raydistill.teachers.noise_prediction import NoisePrediction


def build_teacher(config: TeacherConfig, inputs: int | NoiseConfig) -> Teacher:
    """Load the teacher of `config` onto the GPU of this process, or its CPU.

    `inputs` is what it has to know of what it is asked: a language model the number of real token ids, a denoiser how
    noise is drawn.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    match config:
        case TopKLogitsSection():
            assert isinstance(inputs, int), "language models are told the number of token ids"
            model = load_language_model(config.model)
            torch.nn.Module.to(model, device)
            return TopKLogitsTeacher(config, model, inputs)
        case NoisePredictionTeacher():
            assert isinstance(inputs, NoiseConfig), "denoisers are told how noise is drawn"
            network = load_denoiser(config.model)
            torch.nn.Module.to(network, device)
            return NoisePrediction(config, network, process_of(config.model), inputs)
