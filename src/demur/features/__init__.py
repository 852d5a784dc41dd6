"""Find latents and test what they cause."""
