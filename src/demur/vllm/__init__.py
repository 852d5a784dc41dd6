"""demur in vLLM: each request is steered by its own spec. Nothing here imports vLLM until `register` is called."""

from __future__ import annotations


def register() -> None:
    """What vLLM calls once in each of its processes (entry point group `vllm.general_plugins`).

    Does nothing unless `DEMUR_SPECS` or `DEMUR_INLINE` is set. Raises `InputError` for settings that cannot be carried
    out and for a version of vLLM whose inside is not the one that demur knows, which ends the start.
    """
    from demur.vllm.settings import read_settings

    settings = read_settings()
    if settings is not None:
        from demur.vllm.plugin import install

        install(settings)
