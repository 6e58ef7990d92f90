"""The picture world: art composed into captioned scenes whose truth is known; training of the embedded model."""

from elakit.world.scenes import Scene, SceneEntity, Subject, World, compose, sample

__all__ = ["Scene", "SceneEntity", "Subject", "World", "compose", "sample"]
