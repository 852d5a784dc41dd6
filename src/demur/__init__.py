"""Steer what a language model refuses with sparse-autoencoder latents, and measure what it costs."""
