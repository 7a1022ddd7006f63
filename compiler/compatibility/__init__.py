"""What the code relies on in torch and transformers without a promise that it stays, in one place.

`attnedit.compiler.compatibility.caches` knows the names that a cache goes by; the other modules hold the private names.
"""
