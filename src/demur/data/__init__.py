"""Prompt sets: source, licence, split, intent. Knows no model."""
