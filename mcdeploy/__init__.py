"""mcdeploy: learn which connections of a vision backbone matter, remove the rest, prove it, ship it."""
