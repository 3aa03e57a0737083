"""The smallest prompt of the server tests: a tiny Flux, KSampler, a digest of the latent."""

import queue_client


def flux_prompt(*, seed: int, steps: int = 2) -> dict:
    return {
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "tiny_flux.safetensors", "weight_dtype": "default"},
        },
        "text": {
            "class_type": "SlipstreamTestConditioning",
            "inputs": {"tokens": 8, "dim": 768, "seed": 1},
        },
        "latent": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["text", 0],
                "negative": ["text", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "digest": {"class_type": "SlipstreamTestDigest", "inputs": {"samples": ["sampler", 0]}},
    }


def digest(result: queue_client.Result) -> str:
    return result.outputs["digest"]["text"][0]
