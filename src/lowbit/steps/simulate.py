"""What the tuning of a packed model asks of its inputs."""

from lowbit.modules import fake_activation

__all__ = ["fake_activation"]
