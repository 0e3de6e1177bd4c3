"""Other evaluation harnesses with longrl's policies as their models; docs/harnesses.md."""
