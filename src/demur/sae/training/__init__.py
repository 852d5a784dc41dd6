"""Training SAEs on residuals, whoever gives them. Knows no language model."""
