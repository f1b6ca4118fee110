"""Releases: a merged model in the formats others load, its card, and its place under a version number."""
