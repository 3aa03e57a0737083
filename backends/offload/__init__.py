"""A VRAM budget per model: ComfyUI's own memory manager is steered, weights stay its own.

`apply.apply_offload` puts the technique on a MODEL. `memory.py` and `watch.py` serve the report's
memory section, which every Run has, with or without this technique.
"""
