"""Base: the pretrained model, zero-shot. Nothing is trained."""

ARMS = {"base": ("the pretrained model", None)}
