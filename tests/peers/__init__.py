"""Other libraries' signatures over our functions, held to eager definitions of what they mean."""
