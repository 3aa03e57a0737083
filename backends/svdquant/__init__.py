"""SVDQuant: 4-bit Nunchaku-format files as ordinary ComfyUI models, and the tools that make them.

header, dialects and families are pure header logic; layouts and assemble turn a file's tensors into
segments; linear, kernels and lora compute; host is the part that knows ComfyUI.
"""
