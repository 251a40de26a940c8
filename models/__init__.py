"""Diffusers pipelines as flows, the models that have names, and LoRA files."""
