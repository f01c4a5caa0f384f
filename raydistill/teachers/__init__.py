"""Frozen models that turn inputs into signals. A new one is a configuration section, a file here and a branch below."""

from __future__ import annotations

import torch

from raydistill.config.sources import NoiseConfig
from raydistill.config.teachers import NoisePredictionTeacher, OdeTrajectoryTeacher, TeacherConfig
from raydistill.config.teachers import TopKLogitsTeacher as TopKLogitsSection
from raydistill.config.world import WorldTeacher
from raydistill.models.denoiser import load_denoiser, process_of, scheduler_config
from raydistill.models.load import load_language_model
from raydistill.models.world.files import load_world_teacher
from raydistill.signals import Teacher
from raydistill.teachers.logits import TopKLogitsTeacher
from raydistill.teachers.noise_prediction import NoisePrediction
from raydistill.teachers.ode_trajectory import OdeTrajectory
from raydistill.teachers.world import Features


def build_teacher(config: TeacherConfig, inputs: int | NoiseConfig) -> Teacher:
    """Load the teacher of `config` onto the GPU of this process, or its CPU.

    `inputs` is what it has to know of what it is asked: a language model the number of real token ids, a denoiser how
    noise is drawn, a world model the number of frames in a clip.
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
        case OdeTrajectoryTeacher():
            assert isinstance(inputs, NoiseConfig), "denoisers are told how noise is drawn"
            network = load_denoiser(config.model)
            torch.nn.Module.to(network, device)
            return OdeTrajectory(config, network, process_of(config.model), scheduler_config(config.model), inputs)
        case WorldTeacher():
            assert isinstance(inputs, int), "world models are told the number of frames in a clip"
            world = load_world_teacher(config.model).to(device)
            return Features(config, world, inputs)
