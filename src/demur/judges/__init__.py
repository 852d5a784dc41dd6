"""Judges: what a completion did with its prompt, as a Verdict."""
