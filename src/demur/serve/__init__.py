"""`demur serve`: an OpenAI-compatible server over the Hugging Face engine, with a spec for every request."""
