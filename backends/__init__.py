"""The engine: techniques, the Run that they share, and what is known about model architectures."""
