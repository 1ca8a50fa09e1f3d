"""The structure of Hugging Face models: families, projections, and head maps in configs."""
