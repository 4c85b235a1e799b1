"""The face of `restow.torch.dcp`: Distributed Checkpoint reads and writes Hugging Face folders by native names."""

from restow.torch.dcp import Reader, Writer

__all__ = ["Reader", "Writer"]
