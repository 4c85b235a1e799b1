"""restow."""
