"""Which profile this machine serves."""

from __future__ import annotations

from engine.config import Config
from engine.scheduler.devices import find_gpus, host_memory
from engine.scheduler.gpus import suits
from models.catalog import choose_profile, load_profile, load_profiles
from models.profile import Profile


def chosen_profile(config: Config) -> Profile:
    """The profile named, or the largest that fits this machine.

    Raises:
        CatalogError: there is none of that name, or none fits.
    """
    if config.profile:
        return load_profile(config.profile)
    gpus = find_gpus()
    profiles = [profile for profile in load_profiles() if suits(profile, gpus)]
    return load_profile(choose_profile(profiles, [gpu.memory_bytes for gpu in gpus], host_memory()))
