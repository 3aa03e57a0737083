"""Different prompts in one batch: a list of prompts to CONDITIONING with a row for each.

lines.py reads the list, padding.py knows text encoders, batches.py shares the prompts out and joins
them, encode.py runs the encoder. Nothing here touches a MODEL.
"""
