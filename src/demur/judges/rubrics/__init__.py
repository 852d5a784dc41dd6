"""Rubrics of model judges, one a file: the published text, and how the reply to it is read."""
