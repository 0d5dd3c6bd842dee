"""Mixture-of-experts arithmetic for vLLM's CPU backend, and the plugin that puts it there.

- ``reference``: what a layer of experts computes, in plain PyTorch.
- ``expert_parallel``: a rank's share of it, without work for experts that stand on other ranks.
- ``load``: how many tokens each expert got, in a file that others read.
- ``plugin``: the entry point ``hearth_moe`` of the group ``vllm.general_plugins``.

This file imports nothing: vLLM loads the plugin in every one of its processes.
"""
