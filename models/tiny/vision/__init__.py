"""A tiny LLaVA-style model that names the shapes, colours and counts of drawn scenes."""
