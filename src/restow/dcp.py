"""The face of Distributed Checkpoint: it reads and writes Hugging Face folders by native names."""

from restow.torch.dcp_read import Reader
from restow.torch.dcp_write import Writer

__all__ = ["Reader", "Writer"]
