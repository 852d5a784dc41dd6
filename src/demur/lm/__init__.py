"""Language models: load, chat, hookpoints, record, attach, generate, score. Knows no SAE."""
