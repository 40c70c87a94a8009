"""The token machine shared by both workers: models, weights, paged KV cache, sampler, step loop."""
