"""World models: the protocol of any of them, and a reference family at any size."""

from raydistill.models.world.model import WorldNetwork, empty_world, random_world
from raydistill.models.world.protocol import WorldModel, WorldOutput, require_world_model

__all__ = ["WorldModel", "WorldNetwork", "WorldOutput", "empty_world", "random_world", "require_world_model"]
