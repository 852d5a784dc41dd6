"""Measure a model under a spec: completions, capability, KL, reconstruction, and the statistics of it."""
