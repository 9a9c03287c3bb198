"""DecAF."""
