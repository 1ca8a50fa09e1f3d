"""Results files, tables, figures and the README's block."""
