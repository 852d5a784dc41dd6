"""Steering: a spec (data) made into edits of the residual (maths) for the length of a `with` block."""
