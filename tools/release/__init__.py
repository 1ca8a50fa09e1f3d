"""Builds what is released: wheels, the source distribution, an SBOM and checksums."""
