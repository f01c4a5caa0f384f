"""The signals `features` and `rollout`: what a world model says about clips, or about clips of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from raydistill.config.world import RolloutTeacher, WorldTeacher
from raydistill.errors import ConfigError, SignalMismatch
from raydistill.models.taps import Taps
from raydistill.models.world.actions import repeated_actions
from raydistill.models.world.features import directions, per_clip
from raydistill.models.world.protocol import WorldOutput, check_clips, require_world_model
from raydistill.signals import Batch, Field, JsonValue, Schema, sample_seed

AXES = {"hidden": ("group", "token", "width"), "spatial": ("map", "query", "key"), "temporal": ("map", "query", "key")}


class Features:
    """Keeps a world model's predicted frames, code logits, codes and taps.

    Batch of B clips: `frames` [B, T, C, H, W] uint8, `actions` [B, T - 1] int64, and for rollouts `row_key` [B] int64:
    the first 8 bytes of sha256(row id), which with the teacher's seed decides the actions. The result is on the CPU:
    `frames` [B, T - 1, C, H, W] and, where the model has them, `logits` [B, T - 1, N, K] fp32 and `codes` [B, T, N]
    int32; `tap.<name>` [B, groups, tokens, width] or [B, maps, queries, keys]. For rollouts all of that is said of the
    model's own clips, `trajectory` [B, T, C, H, W] uint8 under `actions` [B, T - 1] int32.
    """

    def __init__(self, config: WorldTeacher, network: nn.Module, clip_frames: int):
        """`clip_frames` is T. The model is asked about one empty clip, to learn the shapes of what it says."""
        where = f"teachers.{config.name}"
        self._model = require_world_model(network, where=where)
        self._config, self._network, self._where = config, network.eval().requires_grad_(False), where
        self._rollout = config if isinstance(config, RolloutTeacher) else None
        if self._rollout is not None and self._rollout.initial_frames >= clip_frames:
            raise ConfigError(
                f"{where}.initial_frames: wanted fewer than the {clip_frames} frames of a clip, found "
                f"{self._rollout.initial_frames}; lower it, or raise source.clip_frames."
            )
        self._taps = Taps(network, {name: tap.module for name, tap in config.taps.items()}, where=f"{where}.taps")
        self._directions: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        channels, height, width = self._model.frame_shape
        empty = torch.zeros(1, clip_frames, channels, height, width, dtype=torch.uint8)
        said = self._said(empty, torch.zeros(1, clip_frames - 1, dtype=torch.long))
        self._shapes = {name: tuple(values.shape[1:]) for name, values in said.items()}
        self.schema: Schema = self._schema(said)
        self.facts: Mapping[str, JsonValue] = {
            "signal": config.signal,
            "num_actions": self._model.num_actions,
            "frame_shape": [channels, height, width],
            "clip_frames": clip_frames,
            "num_codes": said["logits"].shape[-1] if "logits" in said else None,
            "parameters": sum(p.numel() for p in network.parameters()),
            "taps": {
                name: {"module": tap.module, "kind": tap.kind, "shape": list(self._shapes[f"tap.{name}"])}
                for name, tap in config.taps.items()
            },
        }

    def _schema(self, said: Mapping[str, Tensor]) -> Schema:
        fields = {"frames": Field(torch.float32, ("step", "channel", "height", "width"), "predicted frames in [0, 1]")}
        if "logits" in said:
            fields["logits"] = Field(torch.float32, ("step", "token", "code"), "of the codes of those frames")
        if "codes" in said:
            fields["codes"] = Field(torch.int32, ("frame", "token"), "codes of all frames")
        for name, tap in self._config.taps.items():
            axes = tuple(f"{name}.{axis}" for axis in AXES[tap.kind])
            fields[f"tap.{name}"] = Field(torch.float32, axes, f"{tap.kind} of {tap.module}")
        if self._rollout is not None:
            fields["trajectory"] = Field(torch.uint8, ("frame", "channel", "height", "width"), "the model's own clip")
            fields["actions"] = Field(torch.int32, ("step",), "actions that it was made under")
        return fields

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        frames, actions = batch["frames"], batch["actions"]
        check_clips(frames, actions, self._model, where=self._where)
        if self._rollout is None:
            return self._said(frames, actions)
        actions = self._sampled(batch["row_key"], actions.shape[1])
        frames = self.played(frames[:, : self._rollout.initial_frames], actions)
        said = self._said(frames, actions)
        return {**said, "trajectory": frames, "actions": actions.int()}

    @torch.no_grad()
    def played(self, initial: Tensor, actions: Tensor) -> Tensor:
        """Clips uint8 [B, T, C, H, W] that begin with `initial` uint8 and go on as the model has it."""
        device = self._device
        made = self._model.rollout(initial.to(device).float() / 255, actions.to(device))
        return torch.cat([initial, (made.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()], 1)

    def _said(self, frames: Tensor, actions: Tensor) -> dict[str, Tensor]:
        device, config = self._device, self._config
        with self._taps as taps:
            output: WorldOutput = self._model(frames.to(device).float() / 255, actions.to(device))
        said = {"frames": output.frames.float()}
        if config.logits and output.logits is not None:
            said["logits"] = output.logits.float()
        if output.codes is not None:
            said["codes"] = output.codes.int()
        for name, feature in taps.taken().items():
            where = f"{self._where}.taps.{name}"
            found = per_clip(feature, config.taps[name].kind, len(frames), where=where).float()
            said[f"tap.{name}"] = self._reduced(name, found)
        for name, shape in self._shapes.items():
            if tuple(said[name].shape[1:]) != shape:
                raise SignalMismatch(
                    f"{self._where}: wanted {name} of the shape {list(shape)} in every batch, found "
                    f"{list(said[name].shape[1:])}; tap a module whose output does not change its shape."
                )
        return {name: values.cpu() for name, values in said.items()}

    def _reduced(self, name: str, found: Tensor) -> Tensor:
        rank = self._config.rank
        if rank is None or self._config.taps[name].kind != "hidden" or found.shape[-1] <= rank:
            return found
        if name not in self._directions:
            self._directions[name] = directions(name, found.shape[-1], rank).to(found.device)
        return found @ self._directions[name]

    def _sampled(self, keys: Tensor, steps: int) -> Tensor:
        """Actions [B, steps] of each row, whatever the batch."""
        rollout = self._rollout
        assert rollout is not None
        rows = []
        for key in keys.tolist():
            draws = np.random.Generator(np.random.Philox(sample_seed(str(key), 0, "actions", rollout.seed)))
            rows.append(repeated_actions(draws, steps, self._model.num_actions, rollout.repeat))
        return torch.from_numpy(np.stack(rows))

    @property
    def _device(self) -> torch.device:
        return next(self._network.parameters()).device
