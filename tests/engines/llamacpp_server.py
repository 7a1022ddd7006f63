"""Serve a GGUF with xllamacpp until standard input ends: python llamacpp_server.py JSON, in an environment of its own.

Prints the server's address. The JSON names the model, and may name n_ctx, n_batch, n_parallel and the cache's type.
"""

import json
import sys

import xllamacpp

options = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = options["model"]
params.n_ctx = options.get("n_ctx", 512)
params.n_parallel = options.get("n_parallel", 1)
params.n_batch = params.n_ubatch = options.get("n_batch", 512)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.get('cache', 'F16')}")
params.warmup = False
# Its flash attention rounds to half precision on a CPU, whatever the cache is.
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.fit_params = False
# Its server restores the state of an earlier prompt otherwise (docs/engines/llama.cpp.md).
params.n_ctx_checkpoints = 0
params.verbosity = 5
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
