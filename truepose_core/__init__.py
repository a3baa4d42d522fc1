"""The library under ComfyUI-TruePose: tensors in, tensors out, no ComfyUI."""

__version__ = "0.1.0"
