"""Diffusion itself: processes of noise, kinds of prediction, and the noise of a draw."""
