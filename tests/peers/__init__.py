"""Functions with other libraries' signatures, held to eager definitions of what they mean."""
