"""A small text-to-image model of one coloured shape on a coloured background, and how it is made."""
