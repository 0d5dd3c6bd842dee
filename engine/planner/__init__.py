"""Placement: which replica of which model stands on which GPUs, with how much memory, how laid out and why.

Pure: nothing here reads a file, a clock or a device. Filter (``filters``) → select (``select``) → score
(``score``), memory by ``memory``, put together by ``plan.make_plan``.
"""
