"""What a Hugging Face model looks like: its families, its projections, the maps in its config."""
