"""The reference family of world models: tokenizer, dynamics transformer and decoder in one network, at any size."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raydistill.config.world import WorldSizes
from raydistill.models.world.dynamics import Dynamics, empty_memory
from raydistill.models.world.protocol import WorldOutput
from raydistill.models.world.tokenizer import Codebook, Decoder, Encoder, nearest, straight_through


class WorldNetwork(nn.Module):
    """Predicts the next frame of a game from frames and actions. Parts: `encoder`, `codebook`, `dynamics`, `decoder`.

    A frame is predicted as a mixture of codebook entries, by the probabilities of the codes, which the decoder turns
    into pixels; so errors of pixels reach the dynamics. In play the most probable code of each token goes on.
    """

    def __init__(self, sizes: WorldSizes):
        super().__init__()
        self.sizes = sizes
        self.num_actions = sizes.num_actions
        self.frame_shape = (sizes.channels, *sizes.frame_size)
        self.encoder = Encoder(sizes)
        self.codebook = Codebook(sizes)
        self.dynamics = Dynamics(sizes)
        self.decoder = Decoder(sizes)

    def forward(
        self,
        frames: Float[Tensor, "b t c h w"],
        actions: Int[Tensor, "b s"],
        *,
        predict: bool = True,
        reconstruct: bool = False,
    ) -> WorldOutput:
        """Predictions of the frames after the first; with `reconstruct` also every frame out of its own codes.

        Without `predict` the dynamics do not run, and there is a prediction of no frame.
        """
        frames = frames.to(self.codebook.weight.dtype)
        latents = self.encoder(frames)
        entries, assignment = self.codebook(latents)
        codes = nearest(assignment)
        vectors = straight_through(latents, entries, codes)
        logits = self.dynamics(vectors[:, :-1], actions) if predict else None
        mixed = logits.softmax(-1) @ entries if logits is not None else vectors[:, :0]
        steps = mixed.shape[1]
        # One call for both, so that a decoder's features belong to one pass.
        decoded = self.decoder(torch.cat([mixed, vectors], 1) if reconstruct else mixed)
        return WorldOutput(
            frames=decoded[:, :steps],
            logits=logits,
            codes=codes,
            assignment=assignment,
            reconstruction=decoded[:, steps:] if reconstruct else None,
            latents=latents,
            quantised=entries[codes],
        )

    def encode(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        """Unit latents of frames, before they are quantised."""
        latents: Tensor = self.encoder(frames.to(self.codebook.weight.dtype))
        return latents

    @torch.no_grad()
    def rollout(self, initial: Float[Tensor, "b t c h w"], actions: Int[Tensor, "b a"]) -> Float[Tensor, "b s c h w"]:
        """The frames that follow `initial` under `actions` (those between the initial frames first).

        Frames that were seen are not computed again: each step costs one pass over one frame.
        """
        known = initial.shape[1]
        entries, assignment = self.codebook(self.encode(initial))
        vectors = entries[nearest(assignment)]
        memory = empty_memory(self.sizes.layers)
        logits = self.dynamics(vectors, actions[:, :known], memory)[:, -1:]
        found = []
        for step in range(known, actions.shape[1] + 1):
            found.append(self.decoder(logits.softmax(-1) @ entries))
            if step < actions.shape[1]:
                logits = self.dynamics(entries[logits.argmax(-1)], actions[:, step : step + 1], memory)
        return torch.cat(found, 1)


def random_world(sizes: WorldSizes, *, seed: int) -> WorldNetwork:
    """A network with first weights that `seed` decides, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WorldNetwork(sizes)
        for module in network.dynamics.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
    return network.eval()


def empty_world(sizes: WorldSizes) -> WorldNetwork:
    """A network without numbers, on the meta device."""
    with torch.device("meta"):
        return WorldNetwork(sizes)
