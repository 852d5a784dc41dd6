"""Sparse autoencoders: the modules, their files, training and metrics. Knows no language model."""
