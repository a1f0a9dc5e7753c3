"""What runs inside vLLM's workers, put there by `--worker-extension-cls keel_vllm_worker.extension.WorkerExtension`.

vLLM has an environment of its own, where Keel cannot be imported: these modules import torch, vLLM (with what it
brings, safetensors) and each other, and are found under the name `keel_vllm_worker`. `channel` needs torch alone and is
used by the learner's side too.
"""
