"""Attacks that go on for several turns, and what is said of how they went."""
