"""What the code relies on in torch and transformers without a promise that it stays: nothing outside of here does.

- `caches`: the names that a cache goes by.
- `live`: what a rewritten model needs when it runs; with `caches` it goes into checkpoints that carry their own code.
- `torch_names`, `transformers_names`: what the compiler needs.
"""
