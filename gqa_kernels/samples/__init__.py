"""The small model and the texts that demos, commands, benchmarks and tests share."""
